"""Weights, or weights and activations, rounded to half precision where more is claimed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from divergence.diagnosis import weights
from divergence.diagnosis.case import Case
from divergence.diagnosis.hypotheses import Trial

ID = "weight_precision"


def trials(case: Case) -> Iterator[Trial]:
    """Each weight, then all, rounded to bf16 and to fp16."""
    for words, parts in weights.scopes(case):
        for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            yield Trial(
                key=f"{words} {precision}",
                title=f"{words} {'is' if len(parts) == 1 else 'are'} rounded to {precision}".replace(
                    "every weight are", "all weights are"
                ),
                fault=weights.fault(parts, through(dtype)),
                parameters=lambda _, precision=precision, parts=parts: {
                    "precision": precision,
                    "parameters": [str(p) for p in parts],
                },
                fix=f"export {words} from the fp32 checkpoint, or say --precision {precision}-weights if {precision} is meant"
                if precision == "bf16"
                else f"export {words} from the fp32 checkpoint, or say --precision {precision} if {precision} is meant",
            )


def through(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Rounding to `dtype` and back."""
    return lambda weight: weight.to(dtype).to(weight.dtype)
