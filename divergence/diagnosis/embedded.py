"""The rows of embeddings that the first layer is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Fault, LayerUnit

_OF_IT = 0.05
"""Share of the square of what the first layer is given that rows must make up to count as a part of it."""

_ONE = 0.05
"""How near to 1 the factor of rows that are added to others is taken to be 1."""


@dataclass(frozen=True)
class Embedded:
    """Rows of an embedding.

    Attributes:
        name: of the module within the model.
        table: all rows `[row, channel]`.
        rows: those that the inputs ask for, `[batch, token, channel]`.
        factor: what the model multiplies them by.
    """

    name: str
    table: Tensor
    rows: Tensor
    factor: float

    def changed(self, change: Callable[[Tensor], Tensor]) -> Fault:
        """The fault of rows that `change` has gone over."""
        return Fault(hidden=lambda hidden: hidden + (change(self.rows) - self.rows).to(hidden) * self.factor)


def embedded(case: Case) -> Iterator[Embedded]:
    """The embeddings that the input of a first layer is made of, each looked up by one of the inputs."""
    if not isinstance(case.unit, LayerUnit) or case.at.layer != 0:
        return
    hidden = case.unit.hidden
    asked = [
        ids
        for ids in case.given.inputs.values()
        if not ids.is_floating_point() and ids.shape == hidden.shape[:-1] and int(ids.min()) >= 0
    ]
    for name, module in case.given.model.named_modules():
        if not isinstance(module, nn.Embedding) or module.weight.shape[1] != hidden.shape[-1]:
            continue
        table = module.weight.detach()
        for ids in asked:
            if int(ids.max()) >= len(table):
                continue
            rows = table[ids.to(table.device)].to(hidden)
            factor = float((rows * hidden).sum() / rows.square().sum().clamp(min=1e-30))
            if float((factor * rows).square().sum()) < _OF_IT * float(hidden.square().sum()):
                continue
            yield Embedded(name, table, rows, 1.0 if abs(factor - 1) < _ONE else factor)
