"""The mask of an attention product, however it is written, and attention written out."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Fault
from divergence.diagnosis.parts import Attention
from divergence.diagnosis.trace import Call, Handler

HIDES = -100.0
"""What adds less than this to a score hides it."""

Hide = Callable[[Tensor], Tensor]
"""From what is hidden, bool `[..., query, key]`, to what is hidden instead."""


@dataclass(frozen=True)
class Reference:
    """What an attention product of the reference hides, by all of its masks.

    Attributes:
        hidden: bool `[..., query, key]`.
        back: how far before its query every key lies, `[query, key]`; below 0 where it comes later.
    """

    hidden: Tensor
    back: Tensor

    @property
    def causal(self) -> bool:
        """Whether no query sees a later token."""
        return bool((self.hidden | (self.back >= 0)).all())

    def farthest(self) -> Tensor:
        """How far back every query sees, `[batch, query]`; -1 where it sees nothing. Batch is 1 where the
        mask is the same for all, or not known by row."""
        hidden = self.hidden
        # Of three axes the first may be heads.
        hidden = hidden.all(1) if hidden.dim() == 4 else _for_all(hidden)[None]
        return self.back.masked_fill(hidden, -1).amax(-1)


def of_reference(case: Case, attention: Attention) -> Reference | None:
    """What the reference's attention hides; None where none of its masks could be read."""
    found: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        found.append(hidden)
        return hidden

    case.emulated(with_mask(attention, keep))
    wide = [hidden for hidden in found if hidden.dim() >= 2]
    if not wide:
        return None
    hidden = functools.reduce(torch.logical_or, wide)
    # A mask of padding alone is often given once for all queries.
    queries = case.trace.operators[attention.scores].shape[-2]
    if hidden.shape[-2] == 1:
        hidden = hidden.expand(*hidden.shape[:-2], queries, hidden.shape[-1])
    return Reference(hidden, distances(hidden))


def distances(hidden: Tensor) -> Tensor:
    """How far before its query every key lies, `[query, key]`; below 0 where it comes later.

    Keys and queries end at the same token, unless the mask hides the last keys from all queries: places of a
    cache that are still empty, or a causal mask whose first query sees the first key alone.
    """
    visible = ~_for_all(hidden)
    queries, keys = visible.shape
    rows, columns = (torch.arange(n, device=hidden.device) for n in (queries, keys))
    last = columns.expand_as(visible).masked_fill(~visible, -keys).amax(-1)
    past = min(int((last - rows).max()), keys - queries)
    return rows[:, None] + past - columns


def _for_all(hidden: Tensor) -> Tensor:
    """What is hidden whatever the row of the batch and the head, `[query, key]`."""
    return hidden.reshape(-1, *hidden.shape[-2:]).all(0)


def with_mask(
    attention: Attention,
    hide: Hide,
    value: float | None = None,
    *,
    seen: float | None = None,
    weights: Callable[[Tensor], Tensor] | None = None,
) -> Fault:
    """The fault of another mask.

    Args:
        attention: whose.
        hide: what it hides.
        value: what hides; as the reference has it if None.
        seen: what is added where nothing is hidden; as the reference has it if None.
        weights: a change of the probabilities that come of it.
    """

    def make() -> dict[int, Handler]:
        if attention.fused is not None:
            return {attention.fused: lambda call: _fused(call, hide, value, seen, weights)}
        handlers: dict[int, Handler] = {
            index: lambda call: _written(call, hide, value, seen) for index in attention.masks
        }
        if weights is not None:
            change = weights
            handlers[attention.softmax] = lambda call: change(call.run())
        return handlers

    return Fault(operators=make)


def with_softmax(attention: Attention, function: Callable[[Tensor], Tensor]) -> Fault:
    """The fault of another softmax over the last axis."""

    def make() -> dict[int, Handler]:
        if attention.fused is not None:
            return {attention.fused: lambda call: written_out(call, softmax=function)}
        return {
            attention.softmax: lambda call: _converted(
                function(call.args[0] if call.args else call.kwargs["input"]), call
            )
        }

    return Fault(operators=make)


def written_out(
    call: Call,
    *,
    softmax: Callable[[Tensor], Tensor] = lambda scores: scores.softmax(-1),
    product: Callable[[Tensor], Tensor] = lambda scores: scores,
    mask: Tensor | None = None,
) -> Tensor:
    """`scaled_dot_product_attention` step by step, in fp32 where its operands are narrower.

    Args:
        call: of the operator.
        softmax: over the last axis.
        product: a change of the scores before they are scaled.
        mask: to add instead of the call's own.
    """
    query, key, value = (call.argument(i, n) for i, n in enumerate(("query", "key", "value")))
    scale = call.argument(6, "scale")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    groups = query.shape[-3] // key.shape[-3]
    key, value = (t.repeat_interleave(groups, -3) if groups > 1 else t for t in (key, value))
    scores = product(query.float() @ key.float().transpose(-1, -2)) * scale
    added = additive(call, scores) if mask is None else mask
    scores = scores if added is None else scores + added.to(scores.dtype)
    made: Tensor = (softmax(scores).float() @ value.float()).to(query.dtype)
    return made


def additive(call: Call, scores: Tensor) -> Tensor | None:
    """What the operator adds to `scores`: its mask, as numbers."""
    mask = call.argument(3, "attn_mask")
    if mask is not None:
        return (
            torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -math.inf)
            if mask.dtype is torch.bool
            else mask
        )
    if not call.argument(5, "is_causal", False):
        return None
    rows, columns = scores.shape[-2:]
    seen = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril()
    return torch.zeros(rows, columns, dtype=scores.dtype, device=scores.device).masked_fill(~seen, -math.inf)


def visible_ahead(reference: Reference, steps: int) -> Hide:
    """Lets every query see `steps` tokens more."""
    near = (reference.back < 0) & (reference.back >= -steps)
    return lambda hidden: hidden & ~near


def causal_only(reference: Reference) -> Hide:
    """Lets padding be seen."""
    return lambda hidden: hidden & (reference.back < 0)


def padding_only(hidden: Tensor) -> Tensor:
    """Lets later tokens be seen: hides only what the last query cannot see either."""
    return hidden[..., -1:, :].expand_as(hidden)


def hiding(reference: Reference, more: Tensor) -> Hide:
    """Hides `more` than the reference does, `[..., query, key]`."""
    anything = bool(reference.hidden.any())

    def hide(hidden: Tensor) -> Tensor:
        # What hides nothing next to a mask that does is none: a bias of positions, say.
        return hidden | more if not anything or bool(hidden.any()) else hidden

    return hide


def window_of(reference: Reference) -> int:
    """How many tokens the query that sees most can see, itself included; 0 where that is all before it."""
    hidden, back = reference.hidden, reference.back
    farthest = int(back.masked_fill(hidden, -1).max())
    return farthest + 1 if bool((hidden & (back > farthest) & ~_padded(hidden, back)).any()) else 0


def with_window(reference: Reference, length: int) -> Hide:
    """Lets every query see `length` tokens, itself included, of those that are no padding."""
    back = reference.back
    return lambda hidden: torch.where(back < 0, hidden, _padded(hidden, back) | (back >= length))


def _padded(hidden: Tensor, back: Tensor) -> Tensor:
    """Keys that their own queries cannot see."""
    at_itself = hidden & (back == 0)
    return at_itself.any(-2, keepdim=True)


def nothing(hidden: Tensor) -> Tensor:
    """Hides nothing."""
    return torch.zeros_like(hidden)


def same(given: Tensor) -> Tensor:
    """What it is given: hides what the reference hides, or leaves probabilities as they are."""
    return given


def _fused(
    call: Call,
    hide: Hide,
    value: float | None,
    seen: float | None,
    weights: Callable[[Tensor], Tensor] | None,
) -> Any:
    query, key = call.argument(0, "query"), call.argument(1, "key")
    like = torch.empty(query.shape[-2], key.shape[-2], dtype=query.dtype, device=query.device)
    mask = additive(call, like)
    mask = torch.zeros_like(like) if mask is None else mask.to(query.dtype)
    changed = _changed(mask, hide, value, seen)
    change = same if weights is None else weights
    return written_out(call, softmax=lambda scores: change(scores.softmax(-1)), mask=changed)


def _changed(mask: Tensor, hide: Hide, value: float | None, seen: float | None) -> Tensor:
    hidden = mask < HIDES
    wanted = hide(hidden)
    low = mask.min()
    if value is not None:
        low = torch.full_like(low, value)
    elif mask.is_floating_point():
        # What hides nothing has no value that hides.
        low = torch.where(hidden.any(), low, torch.finfo(mask.dtype).min)
    kept = torch.where(hidden, torch.zeros_like(mask), mask if seen is None else mask + seen)
    # Where nothing changes the mask's own value stays, whatever the reference hides with.
    return torch.where(wanted, torch.where(hidden & (value is None), mask, low), kept)


def _written(call: Call, hide: Hide, value: float | None, seen: float | None) -> Any:
    name = getattr(call.func, "__name__", "").strip("_")
    if name == "where":
        condition, left, right = call.args
        chosen = isinstance(left, Tensor) and left.numel() > 1 and left.dim() >= 3
        scores, low = (left, right) if chosen else (right, left)
        hidden = ~condition if chosen else condition
        return torch.where(hide(hidden), _low(low, value, scores), scores + (seen or 0.0))
    if name.startswith("masked_fill"):
        scores, hidden, low = call.args
        return torch.where(hide(hidden), _low(low, value, scores), scores + (seen or 0.0))
    at = _mask_at(call)
    changed = _changed(call.args[at], hide, value, seen)
    return call.func(*(changed if i == at else a for i, a in enumerate(call.args)), **call.kwargs)


def _low(low: Any, value: float | None, like: Tensor) -> Tensor:
    wanted = low if value is None else value
    return (
        wanted.to(like)
        if isinstance(wanted, Tensor)
        else torch.full((), wanted, dtype=like.dtype, device=like.device)
    )


def _mask_at(call: Call) -> int:
    """Which of two operands is the mask: the one that hides, or the one of fewer elements."""
    left, right = call.args[:2]
    lowest = [float(t.min()) if t.is_floating_point() else 0.0 for t in (left, right)]
    if min(lowest) < HIDES and lowest[0] != lowest[1]:
        return lowest.index(min(lowest))
    return 0 if left.numel() < right.numel() else 1


def _converted(result: Tensor, call: Call) -> Tensor:
    given = call.args[0] if call.args else call.kwargs["input"]
    return result.to(call.kwargs.get("dtype") or given.dtype)


def softmax_in(dtype: torch.dtype, *, before: bool, after: bool) -> Callable[[Tensor], Tensor]:
    """A softmax whose scores (`before`) and probabilities (`after`) are rounded to `dtype`."""

    def softmax(scores: Tensor) -> Tensor:
        rounded = scores.to(dtype) if before else scores
        if before and after:
            return functional.softmax(rounded, -1).float()
        result = functional.softmax(rounded.float(), -1)
        return result.to(dtype).float() if after else result

    return softmax


def softmax_in_steps(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A softmax each of whose steps is rounded to `dtype`."""

    def softmax(scores: Tensor) -> Tensor:
        wide = scores.to(dtype)
        powers = (wide - wide.amax(-1, keepdim=True)).exp()
        total = powers.float().sum(-1, keepdim=True).to(dtype)
        return (powers / total).float()

    return softmax
