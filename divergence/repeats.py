"""Repeated heads: a candidate may hold every key and value head several times over.

Grouped-query attention unrolled repeats each head for the queries that share it. Only one of them
can stand against the reference's head; which one matters as soon as they are not the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from divergence.alignment import Pair

if TYPE_CHECKING:
    from torch import Tensor

    from divergence.comparison.metrics import Metrics
    from divergence.layout import Every


def choose_repeats(
    pairs: Iterable[Pair], tensor_of: Callable[[Pair], Tensor], metrics_of: Callable[[Pair], Metrics]
) -> tuple[list[Pair], list[str]]:
    """Has the worst repeat compared wherever the repeats of a head are not equal to the bit.

    Args:
        pairs: as aligned, each with the first repeat.
        tensor_of: the candidate's tensor of a pair, in its own layout.
        metrics_of: candidate against reference, in the layout of the pair.

    Returns:
        The pairs, and a note for each whose repeats are unequal.
    """
    chosen, notes = [], []
    for pair in pairs:
        every = pair.layout.repeats
        if every is None or _are_equal(pair, every, tensor_of(pair)):
            chosen.append(pair)
            continue
        options = [_with_repeat(pair, replace(every, first=i, equal=False)) for i in range(every.repeats)]
        worst = max(options, key=lambda option: _badness(metrics_of(option)))
        chosen.append(worst)
        notes.append(
            f"{pair.candidate}: the {every.repeats} repeats of its heads are not equal; "
            "the one furthest from the reference was compared"
        )
    return chosen, notes


def _are_equal(pair: Pair, every: Every, tensor: Tensor) -> bool:
    repeats = [
        _bits(_with_repeat(pair, replace(every, first=i)).layout.apply(tensor)) for i in range(every.repeats)
    ]
    return all(repeats[0].equal(other) for other in repeats[1:])


def _bits(tensor: Tensor) -> Tensor:
    """The tensor as integers of its size, so that equal NaN are equal."""
    import torch

    sized = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(sized[tensor.element_size()])


def _with_repeat(pair: Pair, every: Every) -> Pair:
    steps = tuple(every if step is pair.layout.repeats else step for step in pair.layout.steps)
    return replace(pair, layout=replace(pair.layout, steps=steps))


def _badness(metrics: Metrics) -> tuple[int, float]:
    """Non-finite values before any error; an error that is no number counts as the largest."""
    error = metrics.rel_l2
    return metrics.cand_nonfinite, math.inf if error is None or math.isnan(error) else error
