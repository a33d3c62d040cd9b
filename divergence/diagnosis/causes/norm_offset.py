"""The gain of a norm as `w` where the model means `1 + w`, or the other way round."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from divergence.diagnosis import weights
from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Change
from divergence.diagnosis.hypotheses import Trial

if TYPE_CHECKING:
    from torch import Tensor

ID = "norm_offset"

_NEARLY_GONE = 0.5


def trials(case: Case) -> Iterator[Trial]:
    """The gains of all norms, then of each, one too large and one too small."""
    gains = weights.gains(case)
    groups = ([tuple(gains)] if len(gains) > 1 else []) + [(part,) for part in gains]
    for offset, words in (
        (1.0, "is used as 1 + w, and the model means w"),
        (-1.0, "is used as w, and the model means 1 + w"),
    ):
        for group in groups:
            which = "of every norm" if len(group) > 1 else f"'{group[0]}'"
            yield Trial(
                key=f"{'all' if len(group) > 1 else group[0]} {offset:+g}",
                title=f"the gain {which} {words}",
                fault=weights.fault(group, _shifted(offset)),
                parameters={
                    "offset": offset,
                    "parameters": [str(p) for p in group],
                },
                fix="multiply by the gain as the reference does: Gemma's norms store w and apply 1 + w, "
                "Llama's apply w",
                exact=partial(_is_gone, case, group, offset),
            )


def _is_gone(case: Case, group: tuple[weights.Part, ...], offset: float, _: float) -> bool:
    """Whether hardly anything of gains around 1 remains: that fits whatever lacks what the norm feeds."""
    named = weights.parameters(case)
    return any(
        abs(float(part.of(named[part.name]).detach().mean()) + offset) < _NEARLY_GONE for part in group
    )


def _shifted(offset: float) -> Change:
    def change(gain: Tensor) -> Tensor:
        return gain + offset

    return change
