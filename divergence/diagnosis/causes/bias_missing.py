"""A bias of the reference that the candidate leaves out."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from divergence.diagnosis import parts
from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Fault
from divergence.diagnosis.hypotheses import Trial

ID = "bias_missing"


def trials(case: Case) -> Iterator[Trial]:
    """Every bias that the site depends on, left out; then all of them."""
    names = parts.biases(case)
    for name in names:
        yield _trial((name,), f"the bias '{name}' is left out")
    if len(names) > 1:
        yield _trial(tuple(names), f"all {len(names)} biases are left out")


def _trial(names: tuple[str, ...], title: str) -> Trial:
    return Trial(
        key=names[0] if len(names) == 1 else "all",
        title=title,
        fault=Fault(parameters=dict.fromkeys(names, torch.zeros_like)),
        parameters=lambda _: {"parameters": list(names)},
        fix=f"load or export '{names[0]}' too: check the projection's bias flag in the converter and the key of the "
        "bias in the checkpoint",
    )
