"""A bias of the reference that the candidate leaves out."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from divergence.diagnosis import weights
from divergence.diagnosis.case import Case
from divergence.diagnosis.hypotheses import Trial

ID = "bias_missing"


def trials(case: Case) -> Iterator[Trial]:
    """Every bias that the site depends on, left out; then all of them."""
    found = weights.biases(case)
    for part in found:
        yield _trial((part,), f"the bias '{part}' is left out")
    if len(found) > 1:
        yield _trial(tuple(found), f"all {len(found)} biases are left out")


def _trial(parts: tuple[weights.Part, ...], title: str) -> Trial:
    return Trial(
        key=str(parts[0]) if len(parts) == 1 else "all",
        title=title,
        fault=weights.fault(parts, torch.zeros_like),
        parameters=lambda _: {"parameters": [str(part) for part in parts]},
        fix=f"load or export '{parts[0].name}' too: check the projection's bias flag in the converter and the key of "
        "the bias in the checkpoint",
    )
