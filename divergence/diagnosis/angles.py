"""Positions and inverse frequencies, read back from the cosines and sines of a rotary embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

_TELLING = 3  # fewer frequencies of one token fit some position by chance
_FARTHEST = 1 << 14  # largest first position that is looked for

BASES = (10_000.0, 500_000.0, 1_000_000.0, 100_000.0, 1000.0)
"""Usual bases of rotary embeddings."""


SPREADS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda t: t,
    lambda t: torch.cat((t, t)),
    lambda t: t.repeat_interleave(2),
)
"""How tables hold frequencies: each once, all of them twice, or each twice."""


def read_back(unit: Tensor) -> tuple[Tensor, Tensor] | None:
    """Positions `[rows, token]` and inverse frequencies of `exp(i position frequency)`."""
    steps = (unit[:, 1:] * unit[:, :-1].conj()).angle().flatten(0, 1)
    moving = steps.abs().amax(1) > 1e-6
    if not bool(moving.any()):
        return None
    frequencies = steps[moving].median(0).values
    fastest = int(frequencies.abs().argmax())
    if float(frequencies[fastest].abs()) < 1e-6:
        return None
    advance = ((unit[:, 1:, fastest] * unit[:, :-1, fastest].conj()).angle() / frequencies[fastest]).round()
    since = torch.cat((torch.zeros_like(advance[:, :1]), advance.cumsum(1)), 1)
    # At far positions the angles of single steps hold more rounding than it takes to tell positions apart.
    frequencies = _refined(unit * unit[:, :1].conj(), since, frequencies)
    positions = _first_positions(unit[:, 0], frequencies)[:, None] + since
    frequencies = _refined(unit, positions, frequencies)
    return (positions, frequencies) if off(unit, positions, frequencies) < 1e-2 else None


def off(unit: Tensor, positions: Tensor, frequencies: Tensor) -> float:
    """How far off `exp(i position frequency)` is from what positions and frequencies were read from: the
    median angle."""
    return float((unit * torch.exp(-1j * positions[:, :, None] * frequencies)).angle().abs().median())


def _refined(unit: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Frequencies by least squares over all positions, of which far ones tell more."""
    for _ in range(3):
        ahead = (unit * torch.exp(-1j * positions[:, :, None] * frequencies)).angle()
        moved = (ahead * positions[:, :, None]).sum((0, 1))
        frequencies = frequencies + moved / positions.square().sum().clamp(min=1)
    return frequencies


def read_one(unit: Tensor, buffers: Iterable[Tensor]) -> tuple[Tensor, Tensor] | None:
    """`read_back` of one token, which shows no frequencies: by those that the model holds, else by usual
    ones."""
    count = unit.shape[-1]
    usual = (
        base ** -(torch.arange(size, dtype=torch.float64) / size)
        for size in (count, count // 2)
        for base in BASES
        if size >= _TELLING
    )
    for buffer in (*buffers, *usual):
        for frequencies in _spread(buffer, unit.shape[-1], unit.device):
            first = _first_positions(unit[:, 0], frequencies, _FARTHEST)
            left = (unit[:, 0] * torch.exp(-1j * first[:, None] * frequencies)).angle()
            if float(left.abs().max()) < 1e-2:
                return first[:, None], frequencies
    return None


def _first_positions(unit: Tensor, frequencies: Tensor, least: int = 16) -> Tensor:
    """The whole number at which `exp(i position frequency)` is `unit` `[rows, frequency]`, for each row."""
    for count in (least, _FARTHEST):
        starts = torch.arange(count, dtype=torch.float64, device=unit.device)
        score, first = (unit @ torch.exp(-1j * starts[:, None] * frequencies).T).real.max(1)
        if bool((score > 0.99 * frequencies.numel()).all()):
            break
    return first


def known_frequencies(buffers: Iterable[Tensor], frequencies: Tensor) -> Tensor:
    """The buffer of the model that holds these frequencies, which has every bit of them."""
    for buffer in buffers:
        for spread in _spread(buffer, frequencies.numel(), frequencies.device):
            if torch.allclose(spread, frequencies, rtol=1e-3, atol=1e-9):
                return spread
    return frequencies


def _spread(buffer: Tensor, count: int, device: torch.device) -> Iterator[Tensor]:
    """Ways in which a buffer could be that many frequencies, float64: as it is, or each twice."""
    if buffer.dim() != 1 or not buffer.is_floating_point() or buffer.numel() not in (count, count // 2):
        return
    wide = buffer.to(device, torch.float64)
    yield from (made for made in (spread(wide) for spread in SPREADS) if made.numel() == count)
