"""The attention mask lets through part of what it should hide, or its window is another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from divergence.diagnosis import masks, parts
from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Fault
from divergence.diagnosis.hypotheses import Trial

if TYPE_CHECKING:
    from torch import Tensor

ID = "mask_leak"

_NEIGHBOURS = (1, -1, 2, -2, 3, -3, 4, -4, 8, -8)
_TIMES = (2, 0.5, 4, 0.25, 8, 0.125)
_FIX = "build the mask as the reference does: {what}"


def trials(case: Case) -> Iterator[Trial]:
    """A causal mask that starts late, padding or later tokens that are seen, another sliding window, a
    value that hides too little."""
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
        yield from _windows(case, number, attention)
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


def _windows(case: Case, number: int, attention: parts.Attention) -> Iterator[Trial]:
    """Sliding windows of other lengths, and none, where the reference has one."""
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden

    case.emulated(masks.with_mask(attention, keep))
    length = masks.window_of(seen[0]) if seen else 0
    if not length:
        return
    tokens = seen[0].shape[-1]
    lengths = [length + steps for steps in _NEIGHBOURS] + [int(length * times) for times in _TIMES]
    for other in (*(n for n in dict.fromkeys(lengths) if 0 < n < tokens), None):
        words = (
            "there is no sliding window" if other is None else f"the sliding window is {other} tokens long"
        )
        yield Trial(
            key=f"attention {number} window {other}",
            title=f"{words}, and the reference's is {length} long",
            fault=masks.with_mask(attention, masks.with_window(tokens if other is None else other)),
            parameters={"window": other, "reference": length},
            fix=_FIX.format(what=f"every query sees {length} tokens, itself included (`sliding_window`)"),
        )


def _weak(attention: parts.Attention) -> Callable[[float], Fault]:
    return lambda value: masks.with_mask(attention, masks.same, value)
