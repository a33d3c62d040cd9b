"""Decides whether a key or value is its site before or after the model's own code scales it.

What the reference holds was seen where it reaches the attention product. An export of the same code
scales at the same place; other code may scale elsewhere, to the same end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from divergence.captures import Capture
from divergence.probes.onnx.found import Found

# Of the magnitude: faults in the contents hardly change it, a scale does.
_CLOSE = 0.05

Fetch = Callable[[Sequence[str]], Iterable[Mapping[str, torch.Tensor]]]


def settle_scales(found: Iterable[Found], reference: Capture, fetch: Fetch) -> list[Found]:
    """What to take instead, of the sites that are scaled on the way to the product.

    Most layers have to agree: one that is scaled unlike the others is at fault, and shall show it.

    Args:
        found: every site.
        reference: the reference's tensors.
        fetch: runs the graph and yields values of these names.
    """
    kinds: dict[tuple[str, str], list[Found]] = defaultdict(list)
    for item in found:
        if item.site in reference.entries:
            kinds[item.site.stack, item.site.tensor].append(item)
    asked = [item for items in kinds.values() for item in items if item.instead is not None]
    if not asked:
        return []
    names = [name for item in asked for name in (item.value, item.instead.value if item.instead else "")]
    sizes = {
        name: _magnitude(tensor)
        for group in fetch(list(dict.fromkeys(names)))
        for name, tensor in group.items()
    }
    settled: list[Found] = []
    for items in kinds.values():
        others = [item.instead for item in items if item.instead is not None]
        votes = sum(_held_instead(item, reference, sizes) for item in items)
        if 2 * votes > len(items):
            settled += others
    return settled


def _held_instead(item: Found, reference: Capture, sizes: Mapping[str, float]) -> bool:
    if item.instead is None:
        return False
    held = _magnitude(reference.tensor(item.site))
    scaled, plain = (abs(sizes[found.value] - held) for found in (item, item.instead))
    return plain <= _CLOSE * held and plain < scaled


def _magnitude(tensor: torch.Tensor) -> float:
    """The root of the mean square: repeated heads leave it as it is."""
    return float(tensor.double().square().mean().sqrt())
