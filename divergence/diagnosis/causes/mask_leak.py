"""The attention mask hides other tokens than the reference's: it lets through part of what it should hide,
or hides more, or its window is another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from divergence.diagnosis import masks, parts
from divergence.diagnosis.case import ENOUGH, Case
from divergence.diagnosis.emulate import Fault
from divergence.diagnosis.hypotheses import Trial

ID = "mask_leak"

_LONGER = (1, 2, 3, 4, 8)
_TIMES = (2, 4, 8)
_FIX = "build the mask as the reference does: {what}"
_MORE = "the attention mask hides more than the reference's: "

_ROUNDING = 4.0  # a single token with an error of so many times the limit is wrong, and not only rounded
_SCANS = 6  # emulations in which the length of a window is looked for
_FITS = 0.01  # share of the error of one token that the right length may leave


def trials(case: Case) -> Iterator[Trial]:
    """A causal mask that starts late or early, padding or later tokens that are seen, another sliding window,
    a value that hides too little."""
    for number, attention in enumerate(parts.attentions(case.trace)):
        if not attention.masks or not case.trace.reaches(case.tensor, attention.context):
            continue
        reference = masks.of_reference(case, attention)
        if reference is not None:
            yield from _ahead(number, attention, reference)
            yield from _windows(case, number, attention, reference)
            yield from _tighter(case, number, attention, reference)
            yield from _seen(number, attention, reference)
        yield Trial(
            key=f"attention {number} weak",
            title="the attention mask adds {value:.4g} to what it should hide, which is too little",
            fault=_weak(attention),
            starts=(-1.0, -3.0, -6.0, -10.0, -15.0),
            accept=lambda value: value > -200,
            parameters=lambda value: {"value": value},
            fix=_FIX.format(what="use the lowest finite value of the scores' dtype (torch.finfo(dtype).min)"),
        )


def _ahead(number: int, attention: parts.Attention, reference: masks.Reference) -> Iterator[Trial]:
    """A causal mask that starts late."""
    for steps in (1, 2, 3, 4):
        hide = masks.visible_ahead(reference, steps)
        if not _changes(reference, hide):
            break
        yield Trial(
            key=f"attention {number} ahead {steps}",
            title=f"the causal mask is off by {steps}: queries see {_tokens(steps, 'later')}",
            fault=masks.with_mask(attention, hide),
            parameters={"ahead": steps},
            fix=_FIX.format(
                what="the diagonal of triu is 1, that of tril 0, and each is one more for every token of the "
                "past"
            ),
        )


def _seen(number: int, attention: parts.Attention, reference: masks.Reference) -> Iterator[Trial]:
    """All padding, or all later tokens, that are seen. They come after the windows: without padding, what
    lets all of it be seen is no window at all."""
    for name, words, hide in (
        ("padding", "padded tokens are seen", masks.causal_only(reference)),
        ("causal", "later tokens are seen, and only padding is hidden", masks.padding_only),
    ):
        if _changes(reference, hide):
            yield Trial(
                key=f"attention {number} {name}",
                title=f"the attention mask leaks: {words}",
                fault=masks.with_mask(attention, hide),
                parameters={"leaks": name},
                fix=_FIX.format(
                    what="combine the causal mask with attention_mask, and feed the latter to the candidate"
                ),
            )


def _changes(reference: masks.Reference, hide: masks.Hide) -> bool:
    return not torch.equal(hide(reference.hidden), reference.hidden)


def _windows(
    case: Case, number: int, attention: parts.Attention, reference: masks.Reference
) -> Iterator[Trial]:
    """Sliding windows of other lengths, and none, where the reference has one."""
    length = masks.window_of(reference)
    shorter = _shorter(case, attention, reference)
    if shorter is not None:
        words = f"the sliding window is {_tokens(shorter)} long, and the reference's is {length} long"
        yield Trial(
            key=f"attention {number} window {shorter}",
            title=words if length else f"{_MORE}a sliding window of {_tokens(shorter)}",
            fault=masks.with_mask(attention, masks.hiding(reference, reference.back >= shorter)),
            parameters={"window": shorter, "reference": length or None},
            fix=_window_fix(length),
        )
    if not length:
        return
    tokens = reference.hidden.shape[-1]
    lengths = [length + steps for steps in _LONGER] + [length * times for times in _TIMES]
    for other in (*(n for n in dict.fromkeys(lengths) if n < tokens), None):
        words = (
            "there is no sliding window" if other is None else f"the sliding window is {_tokens(other)} long"
        )
        yield Trial(
            key=f"attention {number} window {other}",
            title=f"{words}, and the reference's is {length} long",
            fault=masks.with_mask(
                attention, masks.with_window(reference, tokens if other is None else other)
            ),
            parameters={"window": other, "reference": length},
            fix=_window_fix(length),
        )


def _window_fix(length: int) -> str:
    if not length:
        return _FIX.format(what="every query sees all tokens before it, without a window (`sliding_window`)")
    return _FIX.format(what=f"every query sees {length} tokens, itself included (`sliding_window`)")


def _shorter(case: Case, attention: parts.Attention, reference: masks.Reference) -> int | None:
    """Length of the window that hides more than the reference's mask; None where no window fits the error.

    What one query sees bears on its own token alone: one run tries another length at every token.
    """
    wrong = _wrong(case, reference, _ROUNDING)
    if wrong is None or not reference.causal or not bool(wrong.any()):
        return None
    first = wrong.int().argmax(-1)[wrong.any(-1)]  # of every row of the batch that has an error
    far = reference.farthest().expand(wrong.shape)[wrong.any(-1)]
    # A window shows first where the key farthest back is the first that it hides.
    bound = int(far.gather(-1, first[:, None]).min())
    rows = range(int(first.max()), wrong.shape[-1])
    likely = _likeliest(bound)
    found, least = None, ENOUGH
    for start in range(0, len(likely), len(rows))[:_SCANS]:
        lengths = likely[start : start + len(rows)]
        left = _left(case, attention, reference, lengths)
        if float(left.min()) < least:
            found, least = lengths[int(left.argmin())], float(left.min())
        if least < _FITS:
            break
    return found


def _left(case: Case, attention: parts.Attention, reference: masks.Reference, lengths: list[int]) -> Tensor:
    """Share of the squared error that each window leaves at the one token, of the last, that has it."""
    queries, keys = reference.hidden.shape[-2:]
    windows = torch.full((queries, 1), keys, device=reference.back.device)
    windows[-len(lengths) :, 0] = torch.tensor(lengths, device=windows.device)
    more = masks.hiding(reference, reference.back >= windows)
    error = case.error[case.tensor]
    left, whole = (
        _by_token(case, e).square().sum(0)[-len(lengths) :]
        for e in (error - case.emulated(masks.with_mask(attention, more)), error)
    )
    return (left / whole).nan_to_num(math.inf)


def _likeliest(bound: int) -> list[int]:
    """Lengths of windows up to `bound`, likeliest first: what the first error tells, powers of two, and what
    is near the bound, as the first error may be below the rounding."""
    powers = [2**n for n in reversed(range(bound.bit_length()))]
    return list(dict.fromkeys(n for n in (bound, *powers, *range(bound - 1, 0, -1)) if n > 0))


def _tighter(
    case: Case, number: int, attention: parts.Attention, reference: masks.Reference
) -> Iterator[Trial]:
    """Tokens that do not see themselves; a causal mask where the reference has none."""
    wrong = _wrong(case, reference, 1.0)
    if wrong is None:
        return
    if reference.causal:
        yield from _strict(number, attention, reference, wrong)
        yield from _one(number, attention, reference, wrong)
    # The last token sees all others either way. What attends to another sequence has no later tokens.
    elif reference.back.shape[0] == reference.back.shape[1] and not bool(wrong[:, -1].any()):
        yield Trial(
            key=f"attention {number} later",
            title=f"{_MORE}later tokens",
            fault=masks.with_mask(attention, masks.hiding(reference, reference.back < 0)),
            parameters={"hides": "later"},
            fix=_FIX.format(what="it is not causal: every token sees those after it too"),
        )


def _strict(
    number: int, attention: parts.Attention, reference: masks.Reference, wrong: Tensor
) -> Iterator[Trial]:
    """A token does not see itself. The first would see nothing: it sees itself all the same, or all tokens
    alike, as equal scores of the lowest value make it, or is left zero by the operator."""
    itself = reference.back == 0
    lonely = (reference.hidden | itself).all(-1, keepdim=True) & ~reference.hidden.all(-1, keepdim=True)
    others = ~_rows(lonely, wrong) & ~_rows(reference.hidden.all(-1, keepdim=True), wrong)
    if 2 * int((wrong & others).sum()) <= int(others.sum()):
        return
    keys = reference.hidden.shape[-1]
    kinds: dict[str, tuple[str, float | None]] = {"itself": ("", None)}
    if bool((wrong & _rows(lonely, wrong)).any()):
        kinds = {
            "all": (", and the first sees all tokens alike", 1 / keys),
            "nothing": (", and the first sees nothing", 0.0),
        }
    for first, (words, weight) in kinds.items():
        yield Trial(
            key=f"attention {number} strict {first}",
            title=f"{_MORE}a token does not see itself{words}",
            fault=masks.with_mask(
                attention,
                masks.hiding(reference, itself & ~lonely),
                weights=None if weight is None else _weighing(lonely, weight),
            ),
            parameters={"ahead": -1, "first": first},
            fix=_FIX.format(what="the diagonal is seen: that of triu is 1, that of tril 0"),
        )


def _one(
    number: int, attention: parts.Attention, reference: masks.Reference, wrong: Tensor
) -> Iterator[Trial]:
    """One token that those after it do not see, nor perhaps it itself: the first that is wrong tells."""
    queries, keys = reference.hidden.shape[-2:]
    ever = wrong.any(0)
    first = int(ever.int().argmax())
    if not bool(ever.any()) or 2 * int(ever[first:].sum()) <= queries - first:
        return
    for token, itself in ((first - 1, False), (first, True)):
        column = token + keys - queries
        if column < 0:
            continue
        there = torch.arange(keys, device=reference.back.device) == column
        later = reference.back >= 0 if itself else reference.back > 0
        yield Trial(
            key=f"attention {number} one {'itself' if itself else 'later'}",
            title=f"{_MORE}token {column}, which "
            + ("no token sees" if itself else "those after it do not see"),
            fault=masks.with_mask(attention, masks.hiding(reference, there & later)),
            parameters={"hides": "one", "token": column},
            fix=_FIX.format(
                what=f"token {column} is valid (attention_mask, padding), and seen by those after it"
            ),
        )


def _weighing(where: Tensor, weight: float) -> Callable[[Tensor], Tensor]:
    return lambda probabilities: torch.where(where, weight, probabilities)


def _rows(of: Tensor, like: Tensor) -> Tensor:
    """What is said of queries, `[..., query, 1]`, as `[batch, query]`."""
    queries = of[..., 0]
    # Of two axes the first may be heads, which padding does not tell apart.
    queries = queries[:, 0] if queries.dim() == 3 else queries.reshape(-1, queries.shape[-1])[:1]
    return queries.expand(like.shape)


def _wrong(case: Case, reference: masks.Reference, times: float) -> Tensor | None:
    """Which tokens have an error of so many `times` the limit, `[batch, query]`; None where tokens of the
    site are not those that the attention is asked for."""
    error, clean = (_by_token(case, t) for t in (case.error[case.tensor], case.valid_clean(case.tensor)))
    if error.dim() != 2 or error.shape[-1] != reference.hidden.shape[-2]:
        return None
    if reference.hidden.dim() == 4 and reference.hidden.shape[0] not in (1, len(error)):
        return None
    wrong: Tensor = error > times * case.given.limit * case.floor(case.tensor) * clean
    return wrong


def _by_token(case: Case, tensor: Tensor) -> Tensor:
    """Norm of every token, `[batch, token]`; of the whole where the site has not both axes, in that order."""
    axes = case.given.axes_of(case.at)
    kept = tuple(axis for axis in axes if axis in ("batch", "token"))
    if kept != ("batch", "token") or len(axes) != tensor.dim():
        kept = ()
    rest = [i for i, axis in enumerate(axes) if axis not in kept] if kept else None
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=rest)
    return norms


def _tokens(count: int, kind: str = "") -> str:
    return f"{count} {kind}{' ' if kind else ''}token{'' if count == 1 else 's'}"


def _weak(attention: parts.Attention) -> Callable[[float], Fault]:
    return lambda value: masks.with_mask(attention, masks.same, value)
