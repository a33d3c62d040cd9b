"""The attention mask lets through part of what it should hide."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from divergence.diagnosis import masks, parts
from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Fault
from divergence.diagnosis.hypotheses import Trial

ID = "mask_leak"

_FIX = "build the mask as the reference does: {what}"


def trials(case: Case) -> Iterator[Trial]:
    """A causal mask that starts late, padding or later tokens that are seen, a value that hides too
    little."""
    for number, attention in enumerate(parts.attentions(case.trace)):
        if not attention.masks or not case.trace.reaches(case.tensor, attention.context):
            continue
        for steps in (1, 2, 3, 4):
            yield Trial(
                key=f"attention {number} ahead {steps}",
                title=f"the causal mask is off by {steps}: queries see {steps} later "
                f"token{'s' if steps > 1 else ''}",
                fault=masks.with_mask(attention, masks.visible_ahead(steps)),
                parameters={"ahead": steps},
                fix=_FIX.format(what="the diagonal of triu is 1, that of tril 0"),
            )
        for name, words, hide in (
            ("padding", "padded tokens are seen", masks.causal_only),
            ("causal", "later tokens are seen, and only padding is hidden", masks.padding_only),
        ):
            yield Trial(
                key=f"attention {number} {name}",
                title=f"the attention mask leaks: {words}",
                fault=masks.with_mask(attention, hide),
                parameters={"leaks": name},
                fix=_FIX.format(
                    what="combine the causal mask with attention_mask, and feed the latter to the candidate"
                ),
            )
        yield Trial(
            key=f"attention {number} weak",
            title="the attention mask adds {value:.4g} to what it should hide, which is too little",
            fault=_weak(attention),
            starts=(-1.0, -3.0, -6.0, -10.0, -15.0),
            accept=lambda value: value > -200,
            parameters=lambda value: {"value": value},
            fix=_FIX.format(what="use the lowest finite value of the scores' dtype (torch.finfo(dtype).min)"),
        )


def _weak(attention: parts.Attention) -> Callable[[float], Fault]:
    return lambda value: masks.with_mask(attention, masks.same, value)
