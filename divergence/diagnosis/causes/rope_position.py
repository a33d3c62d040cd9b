"""The rotary embedding at other positions: shifted, counting padding, or not at all."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from divergence.diagnosis import rotary
from divergence.diagnosis.case import Case
from divergence.diagnosis.hypotheses import Trial

ID = "rope_position"

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
    for base in (10_000.0, 500_000.0, 1_000_000.0, 100_000.0, 1000.0):
        ratio = found.frequencies.double().clamp(min=1e-30)
        unique = (
            found.unique(max(1, case.clean["key"].shape[-1] // 2))
            if "key" in case.clean
            else found.frequencies
        )
        own = (float(unique[0]) / float(unique[1])) ** unique.numel() if unique.numel() > 1 else 0.0
        if own <= 1 or abs(base / own - 1) < 0.01:
            continue
        stretched = ratio ** (torch.log(torch.tensor(base)) / torch.log(torch.tensor(own)))
        yield Trial(
            key=f"base {base:g}",
            title=f"the rotary embedding's base is {base:g}, and the reference's {own:.6g}",
            fault=found.with_angles(found.angles(positions, stretched)),
            parameters=lambda _, base=base: {"base": base},
            fix="set the rotary embedding's base (rope_theta) to the reference's",
        )


def estimated(case: Case, found: rotary.Rotary) -> list[int]:
    """Offsets that turn the reference's key into the candidate's, by the phase between them over all
    frequencies; none where the site is not a key."""
    if case.tensor != "key":
        return []
    clean, seen = (case.valid("key", t) for t in (case.clean["key"], case.candidate["key"]))
    count = clean.shape[-1] // 2
    frequencies = found.unique(count).double()
    if frequencies.numel() != count:
        return []
    offsets = torch.arange(-4096, 4097, dtype=torch.float64, device=clean.device)
    waves = torch.exp(-1j * offsets[:, None] * frequencies.to(clean.device))
    best: list[int] = []
    for pairs in (clean.unflatten(-1, (2, count)).movedim(-2, -1), clean.unflatten(-1, (count, 2))):
        other = (
            seen.unflatten(-1, (2, count)).movedim(-2, -1)
            if pairs.stride(-1) != 1
            else seen.unflatten(-1, (count, 2))
        )
        z = torch.view_as_complex(pairs.contiguous()).conj() * torch.view_as_complex(other.contiguous())
        together = z.flatten(0, -2).sum(0)
        at = int((waves @ together).real.argmax())
        if int(offsets[at]) != 0:
            best += [int(offsets[at]), -int(offsets[at])]
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
        parameters=lambda _: parameters,
        fix=_FIX.format(what="they start at 0 and count valid tokens, or all, exactly as the reference's do"),
    )
