"""Attention scores or probabilities in half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from divergence.diagnosis import masks, parts
from divergence.diagnosis.case import Case
from divergence.diagnosis.contract import ran_in
from divergence.diagnosis.emulate import Fault
from divergence.diagnosis.hypotheses import Trial
from divergence.diagnosis.trace import Call, Handler
from divergence.emulation import HALVES

ID = "softmax_precision"


def trials(case: Case) -> Iterator[Trial]:
    """Scores, probabilities, both, or every step of the softmax rounded."""
    for number, attention in enumerate(parts.attentions(case.trace)):
        if not case.trace.reaches(case.tensor, attention.context):
            continue
        for precision, dtype in HALVES.items():
            for words, function in _variants(dtype):
                yield Trial(
                    key=f"attention {number} {precision} {words}",
                    title=f"the softmax of attention runs in {precision}: {words} rounded",
                    fault=masks.with_softmax(attention, function),
                    parameters={
                        "precision": precision,
                        "rounded": words,
                    },
                    evidence=lambda case, _: ran_in(case.given.facts, "softmax"),
                    fix="keep scores and softmax in fp32: casts around the softmax in a strongly typed "
                    "network, "
                    "softmax(dtype=torch.float32) in PyTorch",
                )
            for scores in (True, False):
                words = "queries, keys, values, " + ("scores " if scores else "") + "and probabilities are"
                yield Trial(
                    key=f"attention {number} {precision} {words}",
                    title=f"all of the attention runs in {precision}: {words} rounded",
                    fault=_whole(attention, dtype, scores=scores),
                    parameters={"precision": precision, "rounded": words},
                    evidence=lambda case, _: ran_in(case.given.facts, "attention product"),
                    fix="give the attention kernel operands in fp32 (no .half() before it), or say "
                    f"--precision {precision} if it is meant",
                )


def _whole(attention: parts.Attention, dtype: torch.dtype, *, scores: bool) -> Fault:
    """An attention whose kernel is given operands of `dtype` and returns such."""
    softmax = masks.with_softmax(attention, masks.softmax_in(dtype, before=scores, after=True))

    def make() -> dict[int, Handler]:
        handlers = dict(softmax.operators() if softmax.operators else {})
        for index in (attention.scores, attention.context):
            handlers[index] = _between(dtype, handlers.get(index, Call.run))
        return handlers

    return Fault(operators=make)


def _between(dtype: torch.dtype, handler: Handler) -> Handler:
    """`handler` between operands and a result that are rounded."""

    def rounded(value: object) -> object:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 2:
            return value.to(dtype).to(value.dtype)
        return value

    def between(call: Call) -> object:
        args = tuple(rounded(value) for value in call.args)
        return rounded(handler(Call(call.func, args, {n: rounded(v) for n, v in call.kwargs.items()})))

    return between


def _variants(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    yield "scores and probabilities are", masks.softmax_in(dtype, before=True, after=True)
    yield "probabilities are", masks.softmax_in(dtype, before=False, after=True)
    yield "scores are", masks.softmax_in(dtype, before=True, after=False)
    yield "every step is", masks.softmax_in_steps(dtype)
