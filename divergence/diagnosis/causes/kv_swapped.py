"""Key and value are exchanged: their weights, or only the outputs."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from divergence.diagnosis import parts
from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Fault, Tensors
from divergence.diagnosis.hypotheses import Trial

ID = "kv_swapped"


def trials(case: Case) -> Iterator[Trial]:
    """The two outputs exchanged; the two projections exchanged."""
    if not {"key", "value"} <= set(case.clean):
        return
    if case.clean["key"].shape == case.clean["value"].shape:
        yield Trial(
            key="outputs",
            title="the outputs for key and value are exchanged",
            fault=Fault(outputs=exchanged),
            parameters=lambda _: {"exchanged": "outputs"},
            fix="return (key, value) in the reference's order from the export wrapper, and bind outputs by name",
        )
    key, value = (parts.projection(case, t) for t in ("key", "value"))
    if key is None or value is None or key == value:
        return
    named = dict(case.unit.module.named_parameters())
    if named[key].shape == named[value].shape:
        yield Trial(
            key="weights",
            title=f"the weights '{key}' and '{value}' are exchanged",
            fault=exchanged_weights(key, value, named),
            parameters=lambda _: {"exchanged": [key, value]},
            fix=f"exchange '{key}' and '{value}' where the converter maps or splits them",
        )


def exchanged(tensors: Tensors) -> Tensors:
    """Key as value and value as key."""
    return {**tensors, "key": tensors["value"], "value": tensors["key"]}


def exchanged_weights(key: str, value: str, named: dict[str, Tensor]) -> Fault:
    """Weights, and biases where both have one, exchanged."""
    pairs = [(key, value)]
    bias = tuple(n.rpartition(".")[0] + ".bias" for n in (key, value))
    if all(n in named for n in bias):
        pairs.append((bias[0], bias[1]))
    changes = {}
    for a, b in pairs:
        changes[a] = _constant(named[b].detach())
        changes[b] = _constant(named[a].detach())
    return Fault(parameters=changes)


def _constant(tensor: Tensor) -> parts.Change:
    return lambda _: tensor
