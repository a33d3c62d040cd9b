"""The rotary embedding turns other pairs of channels, or the other way round."""

from __future__ import annotations

from collections.abc import Iterator

from divergence.diagnosis import rotary
from divergence.diagnosis.case import Case
from divergence.diagnosis.hypotheses import Trial

ID = "rope_layout"

_WORDS = {"pairs": "neighbouring channels (2i, 2i + 1)", "halves": "channels half a head apart (i, i + d/2)"}


def trials(case: Case) -> Iterator[Trial]:
    """Both ways to pair the channels, turned both ways."""
    found = rotary.find(case)
    if found is None or not found.turns:
        return
    if not any(case.trace.reaches(case.tensor, turn.after) for turn in found.turns):
        return
    for sign in (1.0, -1.0):
        for layout in ("pairs", "halves"):
            backwards = " backwards" if sign < 0 else ""
            yield Trial(
                key=f"{layout} {sign:+g}",
                title=f"the rotary embedding turns {_WORDS[layout]}{backwards}, unlike the reference",
                fault=found.with_layout(layout, sign),
                parameters=lambda _, layout=layout, sign=sign: {"layout": layout, "sign": sign},
                fix="pair the channels as the reference does (`interleaved` of RotaryEmbedding), or permute the rows of "
                "the query and key projections to the other layout",
            )
