"""Rotary angles computed in half precision, where a far position cannot be told from the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from divergence.diagnosis import rotary
from divergence.diagnosis.case import Case
from divergence.diagnosis.contract import ran_in
from divergence.diagnosis.emulate import Fault
from divergence.diagnosis.hypotheses import Trial
from divergence.emulation import HALVES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ID = "rope_precision"

VARIANTS = (
    ("position", "inv_freq", "angle"),
    ("inv_freq",),
    ("angle",),
    ("position", "inv_freq"),
    ("cos and sin",),
    ("position", "inv_freq", "angle", "cos and sin"),
    ("angle", "cos and sin"),
    ("position",),
    ("inv_freq", "angle"),
    ("position", "angle"),
)
"""What is rounded, likeliest first."""


def trials(case: Case) -> Iterator[Trial]:
    """Every combination of roundings in both half precisions, the candidate's own first."""
    found = rotary.find(case)
    if found is None or not any(case.trace.reaches(case.tensor, index) for index in found.uses):
        return
    for precision in sorted(HALVES, key=lambda name: name != case.given.precision):
        for rounded in VARIANTS:
            words = ", ".join(rounded)
            yield Trial(
                key=f"{precision} {words}",
                title=f"the rotary angles run in {precision} (rounded: {words})",
                fault=rounded_angles(found, HALVES[precision], rounded),
                parameters={
                    "precision": precision,
                    "rounded": list(rounded),
                },
                evidence=lambda case, _: evidence(case),
                fix="keep positions, inv_freq, angles, cos and sin in fp32: build a strongly typed network "
                "(TensorRT: NetworkDefinitionCreationFlag.STRONGLY_TYPED) with casts around the rotary "
                "embedding, and do "
                "not convert the buffer inv_freq with module.half()",
            )


def rounded_angles(found: rotary.Rotary, dtype: torch.dtype, rounded: tuple[str, ...]) -> Fault:
    """The fault of angles in which what `rounded` names passes through `dtype`."""

    def through(name: str) -> Callable[[Tensor], Tensor]:
        return (lambda t: t.float().to(dtype).float()) if name in rounded else (lambda t: t.float())

    angles = found.angles(through("position")(found.positions), through("inv_freq")(found.frequencies))
    return found.with_angles(through("angle")(angles), through("cos and sin"))


def evidence(case: Case) -> Iterator[str]:
    """How the error grows with the position, and what the engine says."""
    token = case.result.profile.token
    if len(token) > 1 and token[0] < token[-1]:
        yield (
            f"the error grows with the position: {token[0]:.2g} at the first token, {token[-1]:.2g} "
            "at the last"
        )
    yield from ran_in(case.given.facts, "rotary")
