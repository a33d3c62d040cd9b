"""Attention scores or probabilities in half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from divergence.diagnosis import masks, parts
from divergence.diagnosis.case import Case
from divergence.diagnosis.contract import ran_in
from divergence.diagnosis.hypotheses import Trial

ID = "softmax_precision"


def trials(case: Case) -> Iterator[Trial]:
    """Scores, probabilities, both, or every step of the softmax rounded."""
    for number, attention in enumerate(parts.attentions(case.trace)):
        if not case.trace.reaches(case.tensor, attention.context):
            continue
        for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            for words, function in _variants(dtype):
                yield Trial(
                    key=f"attention {number} {precision} {words}",
                    title=f"the softmax of attention runs in {precision}: {words} rounded",
                    fault=masks.with_softmax(attention, function),
                    parameters=lambda _, precision=precision, words=words: {
                        "precision": precision,
                        "rounded": words,
                    },
                    evidence=lambda case, _: ran_in(case.given.facts, "softmax"),
                    fix="keep scores and softmax in fp32: casts around the softmax in a strongly typed network, "
                    "softmax(dtype=torch.float32) in PyTorch",
                )


def _variants(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    yield "scores and probabilities are", masks.softmax_in(dtype, before=True, after=True)
    yield "probabilities are", masks.softmax_in(dtype, before=False, after=True)
    yield "scores are", masks.softmax_in(dtype, before=True, after=False)
    yield "every step is", masks.softmax_in_steps(dtype)
