"""Attention scores or probabilities in half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from divergence.diagnosis import masks, parts
from divergence.diagnosis.case import Case
from divergence.diagnosis.contract import ran_in
from divergence.diagnosis.emulate import Fault, Tensors
from divergence.diagnosis.hypotheses import Trial
from divergence.diagnosis.trace import Call, Handler
from divergence.emulation import HALVES

ID = "softmax_precision"

_READ = ("key", "value")


def trials(case: Case) -> Iterator[Trial]:
    """Scores, probabilities, both, or every step of the softmax rounded."""
    for number, attention in enumerate(parts.attentions(case.trace)):
        if not case.trace.reaches(case.tensor, attention.context):
            yield from _shown(case, number, attention)
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
            yield from _kernels(number, attention, precision, dtype)


def _kernels(number: int, attention: parts.Attention, precision: str, dtype: torch.dtype) -> Iterator[Trial]:
    """All of an attention rounded."""
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


def _shown(case: Case, number: int, attention: parts.Attention) -> Iterator[Trial]:
    """All of an attention rounded where its keys and values show it: they are what half precision holds."""
    seen = case.candidate[case.tensor]
    for precision, dtype in HALVES.items():
        meant = case.given.precision == precision
        if case.tensor not in _READ or meant or not torch.equal(_through(dtype, seen), seen):
            continue
        for trial in _kernels(number, attention, precision, dtype):
            assert isinstance(trial.fault, Fault)
            yield replace(trial, fault=replace(trial.fault, outputs=partial(_handed_out, dtype)))


def _handed_out(dtype: torch.dtype, seen: Tensors) -> Tensors:
    return {name: _through(dtype, t) if name in _READ else t for name, t in seen.items()}


def _through(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to(dtype).to(tensor.dtype)


def _whole(attention: parts.Attention, dtype: torch.dtype, *, scores: bool) -> Fault:
    """An attention whose kernel is given operands of `dtype` and returns such."""
    softmax = masks.softmax_in(dtype, before=scores, after=True)
    product = partial(_through, dtype) if scores else _as_it_is
    fault = masks.with_softmax(attention, softmax)

    def make() -> dict[int, Handler]:
        if attention.fused is not None:
            written = partial(masks.written_out, softmax=softmax, product=product)
            return {attention.fused: _between(dtype, written)}
        handlers = dict(fault.operators() if fault.operators else {})
        for index in (attention.scores, attention.context):
            handlers[index] = _between(dtype, handlers.get(index, Call.run))
        return handlers

    return Fault(operators=make)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _between(dtype: torch.dtype, handler: Handler) -> Handler:
    """`handler` between operands and a result that are rounded."""

    def rounded(value: object) -> object:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 2:
            return _through(dtype, value)
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
