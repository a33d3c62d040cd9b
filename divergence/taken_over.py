"""Keys and values that a model returns, where they take the place of what reaches attention: what is said of
them, which is also how a later stage knows them."""

from __future__ import annotations

from divergence.errors import counted

TAKEN_OVER = "model output "
"""How what is handed over again says where it was found."""

RETURNED = (TAKEN_OVER, "output named ")
"""How any probe says that it found a key or value among what the model returns."""


def found_in(output: str, axis: int | None = None) -> str:
    """Where it was found: in a model's output, at an index along `axis` where this holds all layers."""
    return f"{TAKEN_OVER}'{output}'" + ("" if axis is None else f", layer along axis {axis}")


def note_on(tensor: str, layers: int, output: str) -> str:
    """The note that `tensor` of so many layers is taken from an output."""
    return (
        f"the {tensor} of {counted(layers, 'layer')} is taken from the model's output '{output}', which "
        "differs from what reaches attention"
    )
