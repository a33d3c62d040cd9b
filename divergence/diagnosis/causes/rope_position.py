"""The rotary embedding at other positions: shifted, counting padding, or not at all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from divergence.diagnosis import rotary
from divergence.diagnosis.angles import BASES, SPREADS
from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Fault
from divergence.diagnosis.hypotheses import Trial

ID = "rope_position"

_POWERS = (0.3, 2.5, 550)  # of the frequencies: a base of 10 000 becomes one of 16 to 10^10
_TOKENS = 128  # what is looked at to find them: steps of the powers turn the last by less than a quarter
_SAME = 1e-3  # relative; of a frequency or an amplitude that is taken to be the reference's
_FEW = 4  # fewer frequencies than this fit many a difference
_OFFSETS = (1, -1, 2, -2, 3, 4)
_FIX = "feed the reference's position_ids: {what}"


def trials(case: Case) -> Iterator[Trial]:
    """Positions shifted as the key shows it, or by a few; counting padding or not; none; stretched."""
    found = rotary.find(case)
    if found is None or not any(case.trace.reaches(case.tensor, index) for index in found.uses):
        return
    positions = found.positions
    for offset in dict.fromkeys((*estimated(case, found), *_OFFSETS)):
        yield _trial(
            found,
            f"offset {offset:+d}",
            f"positions are off by {offset:+d}",
            positions + offset,
            {"offset": offset},
        )
    for name, other in other_positions(case, positions):
        yield _trial(found, name, name, other, {"positions": name})
    for factor in (2.0, 0.5, 4.0, 0.25, 8.0, 0.125):
        yield _trial(
            found,
            f"times {factor:g}",
            f"positions are {factor:g} times the reference's",
            positions * factor,
            {"factor": factor},
        )
    yield from _rows(case, found)
    yield from _bases(case, found)
    yield from _frequencies(case, found)


def _rows(case: Case, found: rotary.Rotary) -> Iterator[Trial]:
    """Positions of some rows of the batch alone."""
    for turned in _turned(case, found):
        offsets = [_offset(found, row) for row in turned]
        if len(set(offsets)) > 1:
            moved = torch.tensor(offsets, dtype=found.positions.dtype, device=found.positions.device)
            yield _trial(
                found,
                f"rows {offsets}",
                "positions are off in some rows of the batch: "
                + ", ".join(f"{offset:+d} in row {row}" for row, offset in enumerate(offsets) if offset),
                found.positions + moved[:, None],
                {"offsets": offsets},
            )


def _frequencies(case: Case, found: rotary.Rotary) -> Iterator[Trial]:
    """Other inverse frequencies, each as the keys show it: a scaling of some of them left out or put in."""
    own = found.unique.double()
    for turned in _turned(case, found):
        other = _other_frequencies(own, found.positions.double(), turned)
        factors = (other / own.clamp(min=1e-30)).tolist()
        changed = [factor for factor in factors if abs(factor - 1) > _SAME]
        if not changed or len(own) < _FEW:
            continue
        size = float(turned.abs().sum()) / max(_size(case, found), 1e-30)
        amplitude = found.amplitude * (size if abs(size - 1) > _SAME else 1.0)
        spread = _spread_as(found.frequencies, own, other)
        if spread is None:
            continue
        changed_too = replace(found, amplitude=amplitude)
        yield Trial(
            key="frequencies",
            title=f"{len(changed)} of {len(own)} frequencies of the rotary embedding are others than the "
            f"reference's, {min(changed):.3g} to {max(changed):.3g} times them"
            + (f", and its cosines and sines {size:.3g} times" if amplitude != found.amplitude else ""),
            fault=changed_too.with_angles(changed_too.angles(found.positions, spread)),
            parameters={"factors": [round(factor, 6) for factor in factors], "amplitude": amplitude},
            exact=lambda _: True,  # with a factor for each frequency, part of any error is explained
            fix="scale the frequencies as the reference's configuration says (rope_scaling, rope_parameters: "
            "rope_type, factor, original_max_position_embeddings; llama3, yarn, longrope, linear)",
        )


def _other_frequencies(own: Tensor, positions: Tensor, turned: Tensor) -> Tensor:
    """Inverse frequencies that turn the reference's key into the candidate's, from how the phase between them
    grows from token to token, and then over all of them."""
    together = turned.sum(1)  # [row, token, frequency]
    steps = (together[:, 1:] * together[:, :-1].conj()).sum((0, 1)).angle()
    more = steps / max(float((positions[:, 1:] - positions[:, :-1]).mean()), 1.0)
    weight = together.abs()
    for _ in range(3):
        left = (together * torch.exp(-1j * positions[:, :, None] * more)).angle()
        more = more + (weight * left * positions[:, :, None]).sum((0, 1)) / (
            weight * positions.square()[:, :, None]
        ).sum((0, 1)).clamp(min=1e-30)
    return own + more


def _size(case: Case, found: rotary.Rotary) -> float:
    """What `_turned` would be in sum if the keys were not turned and of the same size."""
    here, count = found.positions.shape[1], 2 * found.unique.numel()
    clean = case.valid("key", case.clean["key"])[..., -here:, :count]
    return float(clean.square().sum())


def _spread_as(frequencies: Tensor, own: Tensor, other: Tensor) -> Tensor | None:
    """`other` in the order in which `frequencies` hold each of `own`, once or twice."""
    for spread in SPREADS:
        if spread(own).shape == frequencies.shape and torch.allclose(
            spread(own).to(frequencies), frequencies, rtol=1e-4
        ):
            return spread(other)
    return None


def _bases(case: Case, found: rotary.Rotary) -> Iterator[Trial]:
    """Another base, from where the keys show it or from usual ones."""
    unique = found.unique
    own = (float(unique[0]) / float(unique[1])) ** unique.numel() if unique.numel() > 1 else 0.0
    if own <= 1:
        return

    def fault(base: float) -> Fault:
        power = math.log(max(base, 1.001)) / math.log(own)
        stretched = found.frequencies.double().clamp(min=1e-30) ** power
        return found.with_angles(found.angles(found.positions, stretched))

    yield Trial(
        key="base",
        title=f"the rotary embedding's base is {{value:.4g}}, and the reference's {own:.4g}",
        fault=fault,
        starts=(*(own**power for power in estimated_powers(case, found)), *BASES),
        accept=lambda base: base > 1 and abs(base / own - 1) > 0.01,
        parameters=lambda base: {"base": base},
        fix="set the rotary embedding's base (rope_theta) to the reference's",
    )


def _turned(case: Case, found: rotary.Rotary) -> list[Tensor]:
    """How the candidate's key is turned against the reference's: complex products `[row, head, token,
    frequency]` for both ways to pair channels; none where the site is not a key."""
    if case.tensor != "key":
        return []
    count = 2 * found.unique.numel()
    # Of a cache only the end is turned in this call.
    here = found.positions.shape[1]
    keys = [case.valid("key", t)[..., -here:, :] for t in (case.clean["key"], case.candidate["key"])]
    if keys[0].shape[-1] < count:
        return []
    turned = []
    # The channels that are turned are the first of each head, or the last (multi-head latent attention).
    sides = [slice(count)] + ([slice(-count, None)] if keys[0].shape[-1] > count else [])
    for side in sides:
        for shape, axis in (((2, -1), -2), ((-1, 2), -1)):
            pairs = [k[..., side].unflatten(-1, shape).movedim(axis, -1) for k in keys]
            clean, seen = (torch.view_as_complex(p.contiguous()) for p in pairs)
            turned.append(clean.conj() * seen)
    return turned


def estimated(case: Case, found: rotary.Rotary) -> list[int]:
    """Offsets that turn the reference's key into the candidate's, by the phase between them over all
    frequencies; none where the site is not a key."""
    best: list[int] = []
    for turned in _turned(case, found):
        offset = _offset(found, turned)
        if offset:
            best += [offset, -offset]
    return best


def _offset(found: rotary.Rotary, turned: Tensor) -> int:
    """The offset of all tokens of a part of what `_turned` gives."""
    frequencies = found.unique.double()
    offsets = torch.arange(-4096, 4097, dtype=torch.float64, device=frequencies.device)
    waves = torch.exp(-1j * offsets[:, None] * frequencies)
    return int(offsets[int((waves @ turned.flatten(0, -2).sum(0).to(waves.device)).real.argmax())])


def estimated_powers(case: Case, found: rotary.Rotary) -> list[float]:
    """Powers of the frequencies that turn the reference's key into the candidate's, by the phase between
    them at the first tokens; none where the site is not a key."""
    frequencies = found.unique.double().clamp(min=1e-30)
    positions = found.positions[:, :_TOKENS, None].double()
    powers = torch.linspace(*_POWERS, dtype=torch.float64).tolist()
    best = []
    for turned in _turned(case, found):
        together = turned.sum(1)[:, :_TOKENS].to(positions.device)
        scores = [
            float((together * torch.exp(-1j * positions * (frequencies**power - frequencies))).real.sum())
            for power in powers
        ]
        best.append(powers[scores.index(max(scores))])
    return best


def other_positions(case: Case, positions: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Ways to count that differ from the reference's, with a name each."""
    tokens = positions.shape[1]
    plain = torch.arange(tokens, dtype=positions.dtype, device=positions.device)[None]
    mask = case.given.inputs.get("attention_mask")
    candidates = [("positions count padding too", plain)]
    if mask is not None and mask.dim() == 2 and mask.shape[1] >= tokens:
        valid = mask[:, mask.shape[1] - tokens :].to(positions)
        candidates.append(("positions do not count padding", (valid.cumsum(1) - 1).clamp(min=0)))
    candidates += [
        ("no rotary embedding: every position is 0", torch.zeros_like(plain)),
        ("positions run backwards", plain.flip(1)),
    ]
    for name, other in candidates:
        if other.shape != positions.shape or not torch.equal(other, positions):
            yield name, other


def _trial(
    found: rotary.Rotary, key: str, title: str, positions: Tensor, parameters: dict[str, object]
) -> Trial:
    return Trial(
        key=key,
        title=title if title.startswith("no ") else f"the rotary embedding's {title}",
        fault=found.with_angles(found.angles(positions, found.frequencies)),
        parameters=parameters,
        fix=_FIX.format(what="they start at 0 and count valid tokens, or all, exactly as the reference's do"),
    )
