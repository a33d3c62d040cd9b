"""The rotary embedding at other positions: shifted, counting padding, or not at all."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from divergence.diagnosis import rotary
from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Fault
from divergence.diagnosis.hypotheses import Trial

ID = "rope_position"

_BASES = (10_000.0, 500_000.0, 1_000_000.0, 100_000.0, 1000.0)
_POWERS = (0.3, 2.5, 550)  # of the frequencies: a base of 10 000 becomes one of 16 to 10^10
_TOKENS = 128  # what is looked at to find them: steps of the powers turn the last by less than a quarter
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
    yield from _bases(case, found)


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
        starts=(*(own**power for power in estimated_powers(case, found)), *_BASES),
        accept=lambda base: base > 1 and abs(base / own - 1) > 0.01,
        parameters=lambda base: {"base": base},
        fix="set the rotary embedding's base (rope_theta) to the reference's",
    )


def _turned(case: Case, found: rotary.Rotary) -> list[Tensor]:
    """How the candidate's key is turned against the reference's: complex products `[row, head, token,
    frequency]` for both ways to pair channels; none where the site is not a key."""
    if case.tensor != "key":
        return []
    count = found.unique.numel()
    # Of a cache only the end is turned in this call.
    here = found.positions.shape[1]
    keys = [case.valid("key", t)[..., -here:, :] for t in (case.clean["key"], case.candidate["key"])]
    if keys[0].shape[-1] < 2 * count:
        return []
    turned = []
    for halves in (True, False):
        pairs = [
            k[..., : 2 * count].unflatten(-1, (2, count)).movedim(-2, -1)
            if halves
            else k[..., : 2 * count].unflatten(-1, (count, 2))
            for k in keys
        ]
        clean, seen = (torch.view_as_complex(p.contiguous()) for p in pairs)
        turned.append(clean.conj() * seen)
    return turned


def estimated(case: Case, found: rotary.Rotary) -> list[int]:
    """Offsets that turn the reference's key into the candidate's, by the phase between them over all
    frequencies; none where the site is not a key."""
    frequencies = found.unique.double()
    offsets = torch.arange(-4096, 4097, dtype=torch.float64, device=frequencies.device)
    waves = torch.exp(-1j * offsets[:, None] * frequencies)
    best: list[int] = []
    for turned in _turned(case, found):
        at = int((waves @ turned.flatten(0, -2).sum(0).to(waves.device)).real.argmax())
        if int(offsets[at]) != 0:
            best += [int(offsets[at]), -int(offsets[at])]
    return best


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
