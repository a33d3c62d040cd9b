"""The statistics of a norm overflow fp16: squares beyond 65504, from activations beyond 256 on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from divergence.diagnosis import parts
from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Fault
from divergence.diagnosis.hypotheses import Trial
from divergence.diagnosis.trace import Call, Handler

ID = "overflow_norm"

_SQUARES = ("pow", "square", "mul")


def trials(case: Case) -> Iterator[Trial]:
    """Squares in every norm of the layer through fp16, then in each alone."""
    found = [n for n in parts.norms(case.trace) if case.trace.reaches(case.tensor, n.root)]
    groups = [found] if len(found) > 1 else []
    groups += [[norm] for norm in found]
    for group in groups:
        which = "the norms" if len(group) > 1 else f"norm {group[0].number + 1} of the layer"
        yield Trial(
            key="all" if len(group) > 1 else f"norm {group[0].number}",
            title=f"the squares in {which} overflow fp16 (65504), so that the norm returns zeros",
            fault=Fault(operators=lambda group=group: handlers(case, group)),
            parameters=lambda _, group=group: {"norms": [n.number for n in group]},
            evidence=lambda case, _: _evidence(case),
            fix="take the norm's statistics in fp32: cast its input to fp32 and its output back (TensorRT warns of layer "
            "norms in fp16), or normalise x / max|x|",
            prior=-0.01,
        )


def handlers(case: Case, norms: list[parts.Norm]) -> dict[int, Handler]:
    """Handlers that take the statistics of `norms` in fp16."""
    made: dict[int, Handler] = {}
    for norm in norms:
        if norm.fused:
            made[norm.root] = _fused
            continue
        above = case.trace.upstream(
            norm.epsilon_at, frozenset({"mean", "sum", "add", "float", "to", "div", "mul"})
        )
        square = next((o for o in above if o.name in _SQUARES), None)
        if square is not None:
            made[square.index] = _narrow
    return made


def _narrow(call: Call) -> object:
    made = call.run()
    return made.to(torch.float16).to(made.dtype)


def _fused(call: Call) -> object:
    """The norm written out, its squares in fp16."""
    given: Tensor = call.argument(0, "input")
    layer = "layer" in getattr(call.func, "__name__", "")
    shape = call.argument(1, "normalized_shape")
    weight = call.argument(2, "weight")
    bias = call.argument(3, "bias") if layer else None
    epsilon = call.argument(4 if layer else 3, "eps")
    axes = tuple(range(-len(shape), 0))
    wide = given.float()
    centred = wide - wide.mean(axes, keepdim=True) if layer else wide
    squares = centred.square().to(torch.float16).float()
    made = centred * torch.rsqrt(squares.mean(axes, keepdim=True) + (1e-5 if epsilon is None else epsilon))
    made = made if weight is None else made * weight
    return (made if bias is None else made + bias).to(given.dtype)


def _evidence(case: Case) -> Iterator[str]:
    hidden = getattr(case.unit, "hidden", None)
    if hidden is not None:
        reach = float(functional.relu(hidden.nan_to_num(0.0).abs()).max())
        yield f"the layer's input reaches {reach:.4g}; its square is {reach * reach:.4g}, and fp16 ends at 65504"
