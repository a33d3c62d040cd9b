"""The attention mask is not applied."""

from __future__ import annotations

from collections.abc import Iterator

from divergence.diagnosis import masks, parts
from divergence.diagnosis.case import Case
from divergence.diagnosis.hypotheses import Trial

ID = "mask_missing"


def trials(case: Case) -> Iterator[Trial]:
    """Every attention product of the layer without its mask."""
    for number, attention in enumerate(parts.attentions(case.trace)):
        if attention.masks and case.trace.reaches(case.tensor, attention.context):
            yield Trial(
                key=f"attention {number}",
                title="attention runs without its mask: every token sees every other",
                fault=masks.with_mask(attention, masks.nothing),
                fix="pass the mask to the attention operator, or set is_causal: check that the export did not fold an "
                "all-true mask taken from the example inputs into a constant",
            )
