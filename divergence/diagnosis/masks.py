"""The mask of an attention product, however it is written, and attention written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from divergence.diagnosis.emulate import Fault
from divergence.diagnosis.parts import Attention
from divergence.diagnosis.trace import Call, Handler

HIDES = -100.0
"""What adds less than this to a score hides it."""

Hide = Callable[[Tensor], Tensor]
"""From what is hidden, bool `[..., query, key]`, to what is hidden instead."""


def with_mask(
    attention: Attention, hide: Hide, value: float | None = None, *, seen: float | None = None
) -> Fault:
    """The fault of another mask.

    Args:
        attention: whose.
        hide: what it hides.
        value: what hides; as the reference has it if None.
        seen: what is added where nothing is hidden; as the reference has it if None.
    """

    def make() -> dict[int, Handler]:
        if attention.fused is not None:
            return {attention.fused: lambda call: _fused(call, hide, value, seen)}
        return {index: lambda call: _written(call, hide, value, seen) for index in attention.masks}

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
    mask: Tensor | None = None,
) -> Tensor:
    """`scaled_dot_product_attention` step by step, in fp32 where its operands are narrower.

    Args:
        call: of the operator.
        softmax: over the last axis.
        mask: to add instead of the call's own.
    """
    query, key, value = (call.argument(i, n) for i, n in enumerate(("query", "key", "value")))
    scale = call.argument(6, "scale")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    groups = query.shape[-3] // key.shape[-3]
    key, value = (t.repeat_interleave(groups, -3) if groups > 1 else t for t in (key, value))
    scores = query.float() @ key.float().transpose(-1, -2) * scale
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


def visible_ahead(steps: int) -> Hide:
    """Lets every query see `steps` tokens more."""

    def hide(hidden: Tensor) -> Tensor:
        near = torch.ones(hidden.shape[-2:], dtype=torch.bool, device=hidden.device).tril(steps).triu(1)
        return hidden & ~near

    return hide


def causal_only(hidden: Tensor) -> Tensor:
    """Lets padding be seen."""
    later = torch.ones(hidden.shape[-2:], dtype=torch.bool, device=hidden.device).triu(1)
    return hidden & later


def padding_only(hidden: Tensor) -> Tensor:
    """Lets later tokens be seen: hides only what the last query cannot see either."""
    return hidden[..., -1:, :].expand_as(hidden)


def window_of(hidden: Tensor) -> int:
    """How many tokens the query that sees most can see, itself included; 0 where that is all before it."""
    back = _back(hidden).expand_as(hidden)
    farthest = int(back.masked_fill(hidden, -1).max())
    return farthest + 1 if bool((hidden & (back > farthest) & ~_padded(hidden)).any()) else 0


def with_window(length: int) -> Hide:
    """Lets every query see `length` tokens, itself included, of those that are no padding."""

    def hide(hidden: Tensor) -> Tensor:
        back = _back(hidden)
        return torch.where(back < 0, hidden, _padded(hidden) | (back >= length))

    return hide


def _back(hidden: Tensor) -> Tensor:
    """How far before its query every key lies, `[query, key]`; below 0 where it comes later."""
    rows, columns = (torch.arange(n, device=hidden.device) for n in hidden.shape[-2:])
    return rows[:, None] + (len(columns) - len(rows)) - columns


def _padded(hidden: Tensor) -> Tensor:
    """Keys that their own queries cannot see."""
    at_itself = hidden & (_back(hidden) == 0)
    return at_itself.any(-2, keepdim=True)


def nothing(hidden: Tensor) -> Tensor:
    """Hides nothing."""
    return torch.zeros_like(hidden)


def same(hidden: Tensor) -> Tensor:
    """Hides what the reference hides."""
    return hidden


def _fused(call: Call, hide: Hide, value: float | None, seen: float | None) -> Any:
    query, key = call.argument(0, "query"), call.argument(1, "key")
    like = torch.empty(query.shape[-2], key.shape[-2], dtype=query.dtype, device=query.device)
    mask = additive(call, like)
    mask = torch.zeros_like(like) if mask is None else mask.to(query.dtype)
    return written_out(call, mask=_changed(mask, hide, value, seen))


def _changed(mask: Tensor, hide: Hide, value: float | None, seen: float | None) -> Tensor:
    hidden = mask < HIDES
    wanted = hide(hidden)
    low = torch.full((), value, dtype=mask.dtype, device=mask.device) if value is not None else mask.min()
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
