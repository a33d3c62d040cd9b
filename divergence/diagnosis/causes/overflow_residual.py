"""The residual stream leaves the range of fp16."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Fault, LayerUnit
from divergence.diagnosis.hypotheses import Trial
from divergence.diagnosis.trace import Call, Handler

ID = "overflow_residual"

LARGEST = torch.finfo(torch.float16).max


def trials(case: Case) -> Iterator[Trial]:
    """Sums of the residual stream stored in fp16: Inf beyond 65504, or cut there."""
    indices = residual_sums(case)
    reach = _reach(case)
    if not indices or reach <= LARGEST:
        return
    for key, words, store in (("inf", "becomes Inf", to_half), ("cut", "is cut to 65504", cut_to_half)):
        yield Trial(
            key=key,
            title=f"the residual stream leaves the range of fp16 and {words}",
            fault=Fault(operators=partial(_handlers, indices, store)),
            parameters={"largest": reach, "limit": LARGEST},
            evidence=lambda case, _: evidence(case),
            fix="keep the residual stream in bf16 or fp32: the additions and what feeds them (strongly "
            "typed network "
            "with casts), or scale the weights of attention and MLP outputs down",
        )


def residual_sums(case: Case) -> list[int]:
    """Numbers of the additions that carry the residual stream."""
    if not isinstance(case.unit, LayerUnit):
        return []
    shape = tuple(case.unit.hidden.shape)
    # OPT adds in rows of all tokens of the batch.
    shapes = (shape, (math.prod(shape[:-1]), shape[-1]))
    return [
        o.index
        for o in case.trace.named("add")
        if o.shape in shapes and o.dependent == (True, True) and case.trace.reaches(case.tensor, o.index)
    ]


def to_half(tensor: Tensor) -> Tensor:
    """Inf where fp16 has it; what fits is left as it is."""
    return torch.where(tensor.to(torch.float16).isinf(), tensor.to(torch.float16).to(tensor.dtype), tensor)


def cut_to_half(tensor: Tensor) -> Tensor:
    """Cut to the range of fp16."""
    return tensor.clamp(-LARGEST, LARGEST)


def evidence(case: Case) -> Iterator[str]:
    """The reference's range against the format's, and whether consumers saw what is beyond."""
    reach = _reach(case)
    yield f"the reference reaches {reach:.4g} at {case.at}, and the largest number of fp16 is {LARGEST:.0f}"
    layer = case.at.layer
    if layer is None or not case.nonfinite:
        return
    for name in ("key", "value"):
        site = type(case.at)(layer + 1, name, case.at.stack, case.at.call)
        tensor = case.given.candidate(site)
        if tensor is not None:
            held = int((~tensor.isfinite()).sum())
            yield (
                f"its consumer saw it: {site} holds {held} values that are not finite"
                if held
                else f"its consumer did not see it: {site} is finite everywhere"
            )


def _reach(case: Case) -> float:
    tensor = case.clean[case.tensor]
    return float(tensor.nan_to_num(0.0, 0.0, 0.0).abs().max())


def _handlers(indices: list[int], store: Callable[[Tensor], Tensor]) -> dict[int, Handler]:
    return dict.fromkeys(indices, partial(_stored, store))


def _stored(store: Callable[[Tensor], Tensor], call: Call) -> object:
    return store(call.run())
