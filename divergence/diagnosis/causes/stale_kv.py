"""Keys and values of another run: an earlier call, another place in the cache, another batch row."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from divergence.diagnosis import cache
from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Change, Fault, LayerUnit
from divergence.diagnosis.hypotheses import Trial, Tried

ID = "stale_kv"

_FIX = "write keys and values of this call into the cache before it is read: {what}"
_UNRELATED = 0.2  # cosine below which two tensors have nothing to do with each other


def trials(case: Case) -> Iterator[Trial]:
    """Keys and values of the calls before; of other tokens; of other rows of the batch."""
    if case.tensor not in ("key", "value"):
        return
    yield from _given(case)
    yield from _unwritten(case)
    for call in range(case.at.call - 1, 0, -1):
        earlier = _earlier(case, call)
        if earlier:
            yield Trial(
                key=f"call {case.at.call - call}",
                title=f"key and value are those of call {call}, not of call {case.at.call}",
                fault=cache.replaced(case, earlier),
                parameters={"call": call},
                fix=_FIX.format(
                    what="the engine reads the buffer of the call before, or the host does not update it"
                ),
            )
    for shift in (1, -1):
        yield Trial(
            key=f"shift {shift}",
            title=f"key and value stand {abs(shift)} place {'too late' if shift > 0 else 'too early'} in "
            "the cache",
            fault=_moved(case, partial(torch.roll, shifts=shift, dims=-2)),
            parameters={"shift": shift},
            fix=_FIX.format(what="check the cache position that this call writes to"),
        )
    if case.clean[case.tensor].shape[0] > 1:
        yield Trial(
            key="batch",
            title="every row of the batch has the keys and values of the first",
            fault=_moved(case, lambda t: t[:1].expand_as(t)),
            fix=_FIX.format(what="give every row of the batch its own cache"),
        )


def _given(case: Case) -> Iterator[Trial]:
    """Tokens of the cache that the layer was given: this call has not computed them."""
    if not isinstance(case.unit, LayerUnit):
        return
    past = case.clean[case.tensor].shape[-2] - case.unit.hidden.shape[-2]
    other = {n: t for n in ("key", "value") if (t := _wrong_tokens(case, n)) is not None and bool(t.any())}
    if past <= 0 or case.tensor not in other or any(bool(t[past:].any()) for t in other.values()):
        return
    held = {
        name: torch.where(tokens[:, None], case.candidate[name].to(case.clean[name]), case.clean[name])
        for name, tokens in other.items()
    }
    tokens = torch.stack([*other.values()]).any(0).nonzero().flatten().tolist()
    yield Trial(
        key="given",
        title=f"the cache that the layer is given holds {_what(case, tokens)} at {_places(tokens)}",
        fault=cache.replaced(case, held),
        parameters={"tokens": tokens},
        evidence=lambda case, _: [
            f"this call computes {case.site_of(case.tensor)} from token {past} on, and these tokens are right"
        ],
        fix="write keys and values of every call to their own place of the cache, and hand over all of it to "
        "the next call: check where the host copies it, its length and its position",
    )


def _unwritten(case: Case) -> Iterator[Trial]:
    """Tokens of the cache that hold nothing, or what belongs to their neighbour."""
    held: dict[str, Tensor] = {}
    tokens: list[int] = []
    for name in ("key", "value"):
        wrong = _wrong_tokens(case, name)
        shift = None if wrong is None else _shift(case, name, wrong.nonzero().flatten().tolist())
        if wrong is not None and shift is not None:
            clean = case.clean[name]
            instead = clean.roll(shift, -2) if shift else torch.zeros_like(clean)
            held[name] = torch.where(wrong[:, None].to(clean.device), instead, clean)
            tokens = tokens or wrong.nonzero().flatten().tolist()
    if case.tensor not in held:
        return
    what = _what(case, tokens)
    handed_out = "hidden" in case.error and "hidden" not in case.failing
    yield Trial(
        key=f"unwritten {what}",
        title=f"the cache {'that is handed out ' if handed_out else ''}holds {what} at {_places(tokens)}",
        fault=cache.replaced(case, held, read=not handed_out),
        parameters={"tokens": tokens},
        fix=_FIX.format(what="check the cache position that this call writes to, and how many tokens"),
    )


def _shift(case: Case, name: str, tokens: list[int]) -> int | None:
    """How far the tokens that the candidate holds in the place of these lie before them: 0 where it holds
    zeros, None where it holds something else."""
    whole = case.valid_clean(name)
    if not tokens or len(tokens) >= int(whole.transpose(-1, -2).flatten(0, -2).any(0).sum()):
        return None  # a weight of zeros leaves none
    seen = case.valid(name, case.candidate[name])[..., tokens, :]
    if not bool(seen.any()):
        return 0
    for shift in (1, -1):
        moved = whole.roll(shift, -2)[..., tokens, :]
        if float((seen - moved).norm()) < 0.1 * float((whole[..., tokens, :] - moved).norm()):
            return shift
    return None


def _wrong_tokens(case: Case, name: str) -> Tensor | None:
    """At which tokens an error is over the limit, `[token]`; None where there is no such tensor."""
    if name not in case.error or case.clean[name].dim() != 4:
        return None
    error, clean = (t.square().sum((0, 1, 3)).sqrt() for t in (case.error[name], case.valid_clean(name)))
    return error > case.given.limit * case.floor(name) * clean.clamp(min=float(clean.mean()))


def _what(case: Case, tokens: list[int]) -> str:
    """What the candidate's cache holds at these tokens, in words."""
    shift = _shift(case, case.tensor, tokens)
    if shift is None:
        return "something else"
    return {0: "zeros", 1: "what belongs to the token before", -1: "what belongs to the token after"}[shift]


def _places(tokens: list[int]) -> str:
    if len(tokens) == 1:
        return f"token {tokens[0]}"
    if tokens == [*range(tokens[0], tokens[-1] + 1)]:
        return f"tokens {tokens[0]} to {tokens[-1]}"
    return f"{len(tokens)} tokens from {tokens[0]} to {tokens[-1]}"


def facts(case: Case) -> Tried | None:
    """Told without an emulation: keys and values have nothing to do with the reference's, while what
    attention
    makes of the layer's input is right and the tensors are as large as they should be."""
    if not {"key", "value"} <= set(case.failing) or "hidden" in case.failing or "hidden" not in case.error:
        return None
    evidence = []
    for name in ("key", "value"):
        clean, seen = (case.valid(name, t).flatten() for t in (case.clean[name], case.candidate[name]))
        cosine = float(torch.nn.functional.cosine_similarity(_spread(clean), _spread(seen), 0))
        size = float(seen.norm() / clean.norm().clamp(min=1e-30))
        if cosine > 0.9 or not 0.5 < size < 2:
            return None
        evidence.append(
            f"{case.site_of(name)} is as large as the reference's ({size:.3g} times) and yet another "
            f"tensor (cosine {cosine:.2g})"
        )
    evidence.append(
        f"{case.site_of('hidden')} passes, so attention in this layer read the right keys and values"
    )
    trial = Trial(
        "other run",
        "the keys and values that are handed out belong to another run",
        Fault(),
        _FIX.format(what="the cache that is returned is not the one that attention reads"),
    )
    return Tried(ID, trial, None, evidence=tuple(evidence))


def _spread(tensor: Tensor) -> Tensor:
    return tensor - tensor.mean()


def _earlier(case: Case, call: int) -> dict[str, Tensor]:
    """The candidate's own keys and values of an earlier call, the reference's where it shows none."""
    found = {}
    for name in ("key", "value"):
        site = type(case.at)(case.at.layer, name, case.at.stack, call)
        tensor = case.given.candidate(site)
        tensor = case.given.reference(site) if tensor is None else tensor
        if tensor is not None and name in case.clean and tensor.shape == case.clean[name].shape:
            found[name] = tensor.to(case.clean[name])
    return found


def _moved(case: Case, function: Change) -> Fault:
    return cache.changed(case, dict.fromkeys(("key", "value"), function), read=False)
