"""A layer that holds the weights of another."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Change, Fault, LayerUnit
from divergence.diagnosis.hypotheses import Trial

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
            parameters=lambda _, other=other: {"layer": own, "holds": other},
            fix=f"load layer {other}'s weights where layer {other} runs: check the order of layers in the converter (sort "
            "by number, not by name: 'layers.10' sorts before 'layers.2')",
        )


def taken_from(module: nn.Module, other: nn.Module) -> dict[str, Change] | None:
    """Changes that give `module` the parameters of `other`; None where these differ in names or shapes."""
    mine, theirs = dict(module.named_parameters()), dict(other.named_parameters())
    if module is other or {n: p.shape for n, p in mine.items()} != {n: p.shape for n, p in theirs.items()}:
        return None
    return {name: _constant(parameter.detach()) for name, parameter in theirs.items()}


def _constant(tensor: Tensor) -> Change:
    return lambda _: tensor
