"""Weights that are all zero, or all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from divergence.diagnosis import weights
from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Fault
from divergence.diagnosis.hypotheses import Trial

ID = "weights_collapsed"


def trials(case: Case) -> Iterator[Trial]:
    """Every weight that the site depends on, zero; then the same number everywhere, which is estimated."""
    for part in weights.matrices(case):
        yield Trial(
            key=f"{part} zero",
            title=f"'{part}' is all zero",
            fault=weights.fault([part], torch.zeros_like),
            parameters={"parameter": str(part), "value": 0.0},
            fix=f"load '{part.name}': the converter left it out, or a quantiser's scale is 0 or infinite, or "
            "bits of fp16 were read as bf16, which makes all of it about 1e-11",
            exact=lambda _: True,
        )
    for part in weights.gains(case):
        for value, words in ((1.0, "1"), (0.0, "0")):
            yield Trial(
                key=f"{part} {words}",
                title=f"'{part}' is {words} everywhere, as before anything is loaded",
                fault=weights.fault([part], partial(torch.full_like, fill_value=value)),
                parameters={"parameter": str(part), "value": value},
                fix=f"load '{part.name}': the converter left it out, or looks for it under another name",
                exact=lambda _: True,
            )
    for part in weights.matrices(case):
        yield Trial(
            key=f"{part} constant",
            title=f"'{part}' is {{value:.4g}} everywhere",
            fault=_constant(part),
            starts=(0.0, 0.01),
            accept=lambda value: value != 0.0,
            parameters=partial(_reported, part),
            fix=f"load '{part.name}': the candidate holds one number in all of it",
            exact=lambda _: True,
        )


def _reported(part: weights.Part, value: float) -> dict[str, object]:
    return {"parameter": str(part), "value": value}


def _constant(part: weights.Part) -> Callable[[float], Fault]:
    return lambda value: weights.fault([part], lambda weight: torch.full_like(weight, value))
