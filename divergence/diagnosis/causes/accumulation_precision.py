"""Products whose sums are kept in half precision."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from divergence.diagnosis import products, weights
from divergence.diagnosis.case import Case
from divergence.diagnosis.contract import accumulators
from divergence.diagnosis.hypotheses import Trial, Tried

ID = "accumulation_precision"

_CHUNKS = (16, 32, 64, 8, 128, 256, 4, 2, 1)
_FIX = (
    "accumulate in fp32: a tactic whose accumulator is f32, bf16 instead of fp16 on tensor cores, fp32 for the "
    "projections concerned; PyTorch: torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False"
)
_MOST = 5e7  # roundings of a trial, which cost far more than the products


def trials(case: Case) -> Iterator[Trial]:
    """Sums of the projections rounded to half precision after every so many terms."""
    if not case.is_noise:
        return
    indices = products.projections(case)
    for precision, dtype, roundoff in (("fp16", torch.float16, 2.0**-11), ("bf16", torch.bfloat16, 2.0**-8)):
        if not roundoff / 50 < case.size < 50 * roundoff:
            continue
        for chunk in _CHUNKS:
            if sum(_roundings(case, index, chunk) for index in indices) > _MOST:
                continue
            yield Trial(
                key=f"{precision} {chunk}",
                title=f"the sums of projections are kept in {precision}, rounded after every {chunk} "
                f"product{'s' if chunk > 1 else ''}",
                fault=products.computed(indices, products.accumulated(dtype, chunk)),
                parameters=lambda _, precision=precision, chunk=chunk: {
                    "accumulator": precision,
                    "terms": chunk,
                },
                evidence=lambda case, _: accumulators(case.given.facts),
                fix=_FIX,
            )


def facts(case: Case) -> Tried | None:
    """Told from the engine where its order of addition is not the emulation's: it says that it sums in half
    precision, and the error is no larger than that makes it."""
    said = list(accumulators(case.given.facts))
    ratio = case.result.introduced_ratio or case.result.ratio or 0.0
    if not said or ratio > 50:
        return None
    trial = Trial("engine", "the engine sums products in half precision", _none(), _FIX)
    error = f"the error is {ratio:.3g}x the floor with sums in fp32, as sums in half precision make it"
    return Tried(ID, trial, None, evidence=(*said, error))


def _none() -> products.Fault:
    return products.Fault()


def _roundings(case: Case, index: int, chunk: int) -> float:
    operator = case.trace.operators[index]
    inner = (
        max(weights.inner_length(case, name) for name in operator.parameters) if operator.parameters else 1024
    )
    return math.prod(operator.shape) * inner / chunk
