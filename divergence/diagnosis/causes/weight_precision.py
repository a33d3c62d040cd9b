"""Weights, or weights and activations, rounded to half precision where more is claimed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from divergence.diagnosis import weights
from divergence.diagnosis.case import Case
from divergence.diagnosis.embedded import embedded
from divergence.diagnosis.hypotheses import Trial
from divergence.emulation import HALVES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ID = "weight_precision"


def trials(case: Case) -> Iterator[Trial]:
    """Each weight, then all, then gains and biases too, rounded to bf16 and to fp16."""
    for words, parts in weights.scopes(case):
        yield from _trials(words if len(parts) == 1 else "all weights", parts)
    # A whole checkpoint that was half precision once has gains, biases and embeddings rounded as well.
    every = weights.whole(case)
    yield from _trials("all weights, gains and biases", every)
    if case.is_layer and case.at.layer == 0:
        yield from _trials("all weights, gains and biases", every, embedded=True)
        yield from _embedding(case)


def _embedding(case: Case) -> Iterator[Trial]:
    """The embedding alone."""
    for found in embedded(case):
        for precision, dtype in HALVES.items():
            yield Trial(
                key=f"{found.name} {precision}",
                title=f"the embedding is rounded to {precision}",
                fault=found.changed(through(dtype)),
                parameters={"precision": precision, "module": found.name},
                fix="export the embedding from the fp32 checkpoint",
            )


def _trials(words: str, parts: list[weights.Part], *, embedded: bool = False) -> Iterator[Trial]:
    """Parts, and what enters the layer where it is `embedded`, rounded; the key is the same in later
    layers, which nothing is embedded for."""
    for precision, dtype in HALVES.items():
        meant = "bf16-weights" if precision == "bf16" else precision
        function = through(dtype)
        fault = weights.fault(parts, function)
        which = f"the embedding and {words}" if embedded else words
        yield Trial(
            key=f"{words} {precision}",
            title=f"{which} {'is' if len(parts) == 1 else 'are'} rounded to {precision}",
            fault=replace(fault, hidden=function) if embedded else fault,
            parameters={"precision": precision, "parameters": [str(p) for p in parts]},
            fix=f"export {which} from the fp32 checkpoint, or say --precision {meant} if it is meant",
        )


def through(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Rounding to `dtype` and back."""
    return lambda weight: weight.to(dtype).to(weight.dtype)
