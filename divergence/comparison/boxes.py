"""Both tensors of a comparison in parts, each of which is worked on at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from divergence.comparison.views import Form, Operands


@dataclass(frozen=True)
class Part:
    """Part of both tensors `[batch, head, token, channel]`, and where it starts."""

    ref: torch.Tensor
    cand: torch.Tensor
    start: tuple[int, int, int, int]


def boxes_of(given: Operands, limit: int) -> Iterator[Part]:
    """Both tensors in boxes of at most `limit` elements that are consecutive in canonical order."""
    for first_head, ref, cand in _slabs(given):
        steps: list[int] = []
        room = limit
        for size in reversed(ref.shape):
            steps.insert(0, max(1, min(size, room)))
            room //= steps[0]
        ranges = [range(0, size, step) for size, step in zip(ref.shape, steps, strict=True)]
        for start in itertools.product(*ranges):
            part = tuple(slice(i, i + step) for i, step in zip(start, steps, strict=True))
            yield Part(ref[part], cand[part], (start[0], first_head + start[1], start[2], start[3]))


def _slabs(given: Operands) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Both tensors as `[batch, head, token, channel]`, and their first head: several head axes are
    one where memory allows that view, and are gone through one by one where not."""
    form: Form = given.form
    ref, cand = form.view(given.ref), form.view(given.cand)
    try:
        whole = ref.view(form.pooled), cand.view(form.pooled)
    except RuntimeError:
        inner = form.sizes[-3]
        for n, index in enumerate(itertools.product(*(range(size) for size in form.sizes[1:-3]))):
            at: tuple[slice | int, ...] = (slice(None), *index)
            yield n * inner, ref[at], cand[at]
    else:
        yield 0, *whole
