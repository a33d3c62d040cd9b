"""Key and value are exchanged: their weights, or only the outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from divergence.diagnosis import weights
from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Change, Fault, Tensors
from divergence.diagnosis.hypotheses import Trial

if TYPE_CHECKING:
    from torch import Tensor

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
            parameters={"exchanged": "outputs"},
            fix="return (key, value) in the reference's order from the export wrapper, and bind outputs by "
            "name",
        )
    key, value = (weights.projection(case, t) for t in ("key", "value"))
    named = weights.parameters(case)
    if key is None or value is None or key.of(named[key.name]).shape != value.of(named[value.name]).shape:
        return
    yield Trial(
        key="weights",
        title=f"the weights '{key}' and '{value}' are exchanged",
        fault=exchanged_weights(key, value, named),
        parameters={"exchanged": [str(key), str(value)]},
        fix=f"exchange '{key}' and '{value}' where the converter maps or splits them",
    )


def exchanged(tensors: Tensors) -> Tensors:
    """Key as value and value as key."""
    return {**tensors, "key": tensors["value"], "value": tensors["key"]}


def exchanged_weights(key: weights.Part, value: weights.Part, named: Mapping[str, Tensor]) -> Fault:
    """Weights, and biases where both have one, exchanged."""
    pairs = [(key, value)]
    biases = [replace(part, name=f"{part.name.rpartition('.')[0]}.bias", axis=0) for part in (key, value)]
    if all(bias.name in named for bias in biases):
        pairs.append((biases[0], biases[1]))
    return weights.one_after_another(
        (to.name, to.change(_constant(other.of(named[other.name].detach()))))
        for a, b in pairs
        for to, other in ((a, b), (b, a))
    )


def _constant(tensor: Tensor) -> Change:
    return lambda _: tensor
