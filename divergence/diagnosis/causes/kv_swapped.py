"""Key and value, of cross-attention too, are exchanged: their weights, or only the outputs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from divergence.diagnosis import weights
from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Change, Fault, Tensors
from divergence.diagnosis.hypotheses import Trial
from divergence.sites import KEYS_AND_VALUES

if TYPE_CHECKING:
    from torch import Tensor

ID = "kv_swapped"

Pair = tuple[str, str]

_SHOWN = frozenset(name for pair in KEYS_AND_VALUES for name in pair)


def trials(case: Case) -> Iterator[Trial]:
    """The two outputs exchanged; the two projections exchanged; of the attention that the site belongs to, of
    any where it is behind them."""
    for pair in KEYS_AND_VALUES:
        if set(pair) <= set(case.clean) and (case.tensor in pair or case.tensor not in _SHOWN):
            yield from _of_pair(case, pair)


def _of_pair(case: Case, pair: Pair) -> Iterator[Trial]:
    first, second = pair
    cross = "cross " if pair != KEYS_AND_VALUES[0] else ""
    if case.clean[first].shape == case.clean[second].shape:
        yield Trial(
            key=f"{cross}outputs",
            title=f"the outputs for {first} and {second} are exchanged",
            fault=Fault(outputs=partial(exchanged, pair=pair)),
            parameters={"exchanged": "outputs"},
            fix=f"return ({first}, {second}) in the reference's order from the export wrapper, and bind "
            "outputs by name",
        )
    key, value = (weights.projection(case, t) for t in pair)
    named = weights.parameters(case)
    if key is None or value is None or key.of(named[key.name]).shape != value.of(named[value.name]).shape:
        return
    yield Trial(
        key=f"{cross}weights",
        title=f"the weights '{key}' and '{value}' are exchanged",
        fault=exchanged_weights(case, key, value),
        parameters={"exchanged": [str(key), str(value)]},
        fix=f"exchange '{key}' and '{value}' where the converter maps or splits them",
    )


def exchanged(tensors: Tensors, pair: Pair = KEYS_AND_VALUES[0]) -> Tensors:
    """Key as value and value as key."""
    return {**tensors, pair[0]: tensors[pair[1]], pair[1]: tensors[pair[0]]}


def exchanged_weights(case: Case, key: weights.Part, value: weights.Part) -> Fault:
    """Weights, and biases where both have one, exchanged."""
    pairs, named = [(key, value)], weights.parameters(case)
    first, second = (weights.bias_of(case, part) for part in (key, value))
    if first is not None and second is not None:
        pairs.append((first, second))
    return weights.one_after_another(
        (to.name, to.change(_constant(other.of(named[other.name].detach()))))
        for a, b in pairs
        for to, other in ((a, b), (b, a))
    )


def _constant(tensor: Tensor) -> Change:
    return lambda _: tensor
