"""A layer that holds the weights of another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Change, Fault, LayerUnit
from divergence.diagnosis.hypotheses import Trial
from divergence.probes.pytorch.placement import named_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

ID = "layer_order"


def trials(case: Case) -> Iterator[Trial]:
    """The weights of every other layer of the stack, nearest first."""
    # Another layer's weights show in the first tensor that a layer makes.
    if not isinstance(case.unit, LayerUnit) or (case.tensor == "hidden" and "key" in case.error):
        return
    own = case.unit.call.layer
    layers = case.unit.stack
    for other in sorted((i for i in range(len(layers)) if i != own), key=lambda i: abs(i - own)):
        changes = taken_from(case.unit.module, layers[other])
        if changes is None:
            continue
        yield Trial(
            key=f"offset {other - own}",
            title=f"layer {own} holds the weights of layer {other}",
            fault=Fault(parameters=changes),
            parameters={"layer": own, "holds": other},
            fix=f"load layer {other}'s weights where layer {other} runs: check the order of layers in the "
            "converter (sort "
            "by number, not by name: 'layers.10' sorts before 'layers.2')",
        )


def taken_from(module: nn.Module, other: nn.Module) -> dict[str, Change] | None:
    """Changes that give `module` the parameters of `other`; None where these differ in names or shapes."""
    mine, theirs = dict(module.named_parameters()), dict(other.named_parameters())
    if module is other or {n: p.shape for n, p in mine.items()} != {n: p.shape for n, p in theirs.items()}:
        return None
    return {name: _constant(weight.detach()) for name, weight in named_weights(other)}


def _constant(tensor: Tensor) -> Change:
    return lambda own: tensor.to(own.device, own.dtype)
