"""Comparison on a GPU: both tensors are read once, where they are, by a Triton kernel (`triton_kernel`).

Nothing but results is copied to the host, in one piece. Beside the tensors there are partial sums
(`divergence.comparison.tiling`) and the results: a tensor whose partial sums would take more is gone over in
several launches. All sums are in float64 and are added up in an order that depends on shapes and dtypes
only: a call gives the same bits each time. It is another order than on the CPU: figures agree with the
definitions, and so with the CPU, to a relative 1e-12.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from divergence.comparison import triton_parts as kernel
from divergence.comparison.matrix import Matrix, pair_of, stored, table
from divergence.comparison.metrics import (
    EXPONENTS,
    PROFILE_ENTRIES,
    Floats,
    Metrics,
    Scan,
    arrange,
    assemble,
)
from divergence.comparison.tiling import COLUMN_BYTES, ROW_BYTES, Launch, Plan, Tiling, suitable
from divergence.comparison.triton_kernel import compare as compare_matrices
from divergence.comparison.unlike import with_unlike
from divergence.comparison.views import Operands, operands
from divergence.precision import integers_of

if TYPE_CHECKING:
    from divergence.comparison.views import Values

MOST_FIGURES = 1 << 14
"""Programs whose figures are kept to the end; of more, those of each launch are put together after it."""


def compare(
    ref: Values,
    cand: Values,
    *,
    axes: tuple[str, ...] = (),
    mask: Values | None = None,
    entries: int = PROFILE_ENTRIES,
    tiling: Tiling | None = None,
    memory: tuple[int, int] = (ROW_BYTES, COLUMN_BYTES),
) -> Metrics:
    """Compares two tensors on one device in one pass.

    Where the kernel cannot (dtypes that it does not read, several head axes that are not one in memory,
    axes beyond `LONGEST`), they are compared on the CPU, which copies them there box by box.

    Args and raises: as `divergence.comparison.compare_tensors`; `entries` as `metrics.PROFILE_ENTRIES`;
    `tiling` by default what suits shape and dtypes; `memory`: `ROW_BYTES` and `COLUMN_BYTES`.
    """
    results = launch(ref, cand, axes=axes, mask=mask, entries=entries, tiling=tiling, memory=memory)
    if results is None:
        from divergence.comparison import cpu

        return cpu.compare(ref, cand, axes=axes, mask=mask, entries=entries)
    return results.metrics()


def launch(
    ref: Values,
    cand: Values,
    *,
    axes: tuple[str, ...] = (),
    mask: Values | None = None,
    entries: int = PROFILE_ENTRIES,
    tiling: Tiling | None = None,
    memory: tuple[int, int] = (ROW_BYTES, COLUMN_BYTES),
) -> Results | None:
    """Starts a comparison and does not wait for it.

    Args and raises: as `compare`.

    Returns:
        What holds the results when the device is done; None where the kernel cannot compare these.
    """
    given = operands(ref, cand, axes, mask)
    pair = pair_of(given)
    if pair is None:
        return None
    matrix = Matrix(given.form, given.mask, *pair)
    plan = Plan.of(matrix, tiling or suitable(matrix), memory)
    results = Results(given, matrix, plan, entries)
    for part in plan.launches:
        results.run(part)
    return results


class _Axis:
    """How the members of one flattened axis are pooled, and where sums over them are."""

    def __init__(self, size: int, entries: int, share: int) -> None:
        """`share`: rows or columns that each member has."""
        self.share = share
        self.group = -(-size // entries)
        self.entries = -(-size // self.group)
        self.members = np.full(self.entries, self.group, np.int64)
        self.members[-1] = size - self.group * (self.entries - 1)

    def add(self, sums: torch.Tensor, start: int, to: torch.Tensor) -> None:
        """Adds sums `[parts, rows or columns, 4]` from `start` on to those of their entries."""
        group = self.group * self.share
        first, before = divmod(start, group)
        behind = -(before + sums.shape[1]) % group
        if before or behind:
            sums = torch.nn.functional.pad(_summed(sums), (0, 0, before, behind))
        pooled = sums.view(len(sums), -1, group, 4).sum((0, 2))
        to[first : first + len(pooled)] += pooled


class Results:
    """What is found, in one buffer on the device.

    Attributes:
        buffer: `[words]` int64: the histogram, members of each axis that were not compared, the upper half of
            the largest error so far, integers and floats of each program (see `triton_parts.FLOATS`) or, of
            more than `MOST_FIGURES` programs, of each launch, and the sums of each axis, float64.
        parts: views of these.
    """

    def __init__(self, given: Operands, matrix: Matrix, plan: Plan, entries: int) -> None:
        self.given, self.matrix, self.plan = given, matrix, plan
        self.token = _Axis(matrix.rows, entries, 1)
        self.channel = _Axis(matrix.columns, entries, 1)
        self.head = _Axis(matrix.heads, entries, matrix.channels)
        axes = (self.token, self.channel, self.head)
        sizes = [EXPONENTS, *(axis.entries for axis in axes), 1]
        self.by_launch = plan.programs > MOST_FIGURES
        kept = len(plan.launches) if self.by_launch else plan.programs
        sizes += [kept * kernel.INTEGERS.value, kept * kernel.FLOATS.value]
        sizes += [4 * axis.entries for axis in axes]
        # Even numbers of words: addresses stay multiples of 16.
        self.ends = list(itertools.accumulate(size + size % 2 for size in sizes))
        self.sizes = sizes
        self.buffer = torch.zeros(self.ends[-1], dtype=torch.int64, device=matrix.device)
        self.mask, self.plain = _masks(matrix, plan.tiling.depth)

    def parts(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Views of the buffer or of its copy."""
        starts = [0, *self.ends]
        parts = [buffer[start : start + size] for start, size in zip(starts, self.sizes, strict=False)]
        return parts[:6] + [part.view(torch.float64) for part in parts[6:]]

    def run(self, launch: Launch) -> None:
        """Goes over a part of the matrix."""
        matrix, tiling = self.matrix, self.plan.tiling
        (histogram, token_lost, channel_lost, head_lost, peak, integers, floats, token, channel, head) = (
            self.parts(self.buffer)
        )
        blocks, strips = -(-len(launch.rows) // tiling.depth), -(-len(launch.columns) // tiling.width)
        rows = len(launch.rows) * strips
        partial = torch.empty(
            (rows + len(launch.columns) * blocks, 4), dtype=torch.float64, device=matrix.device
        )
        row_sums, column_sums = partial[:rows], partial[rows:]
        figures = floats, integers
        if self.by_launch:
            counts = kernel.FLOATS.value, kernel.INTEGERS.value
            figures = (
                floats.new_empty(launch.programs * counts[0]),
                integers.new_empty(launch.programs * counts[1]),
            )
        aligned = all(map(matrix.aligned, matrix.sides))
        token_group, channel_group, head_group = (
            axis.group for axis in (self.token, self.channel, self.head)
        )
        unit = 16 if aligned else 1
        with _on(matrix.device):
            compare_matrices[(launch.programs,)](
                *self._sides(unit), self.mask, self.plain[launch.rows.start // tiling.depth :],
                matrix.heads, matrix.tokens, matrix.channels // (1 if matrix.flat & 12 == 12 else unit),
                *self._part(launch),
                histogram, token_lost, token_group, channel_lost, channel_group, head_lost, head_group,
                row_sums, column_sums, *figures, peak, 0 if self.by_launch else launch.first,
                **self._constants(), SAME=matrix.same_dtype, ALIGNED=aligned,
                NATIVE=aligned and matrix.native and tiling.rows > 1,
                BR=tiling.rows, LOG_BR=tiling.rows.bit_length() - 1, STAGES=tiling.stages,
                num_warps=tiling.threads // 32, enable_fp_fusion=True, maxnreg=tiling.registers,
            )  # fmt: skip
        if self.by_launch:
            for part, whole in zip(_together(*figures), (floats, integers), strict=True):
                whole[launch.number * len(part) : (launch.number + 1) * len(part)] = part
        self.token.add(row_sums.view(strips, -1, 4), launch.rows.start, token.view(-1, 4))
        by_column = _summed(column_sums.view(blocks, -1, 4))
        self.channel.add(by_column, launch.columns.start, channel.view(-1, 4))
        if matrix.form.has_head:
            self.head.add(by_column, launch.columns.start, head.view(-1, 4))

    def _sides(self, unit: int) -> list[Any]:
        """Both sides for a kernel: address, steps in units of `unit`, values of bytes."""
        sides: list[Any] = []
        for side in self.matrix.sides:
            steps = (step // unit for step in self.matrix.steps(side))
            sides += [
                side.view(integers_of(side.element_size())),
                *steps,
                table(side.dtype, self.matrix.device),
            ]
        return sides

    def _part(self, launch: Launch) -> tuple[int, ...]:
        return (
            *(launch.rows.start, launch.rows.stop),
            *(launch.columns.start // 32, launch.columns.stop),
            self.plan.tiling.depth,
        )

    def _constants(self) -> dict[str, Any]:
        ref, cand = self.matrix.sides
        tiling = self.plan.tiling
        return {
            "REF": stored(ref.dtype),
            "CAND": stored(cand.dtype),
            "WIDE": self.matrix.wide,
            "FLAT": self.matrix.flat,
            "MASKED": self.matrix.mask is not None,
            "NT": tiling.threads,
            "V": tiling.run,
            "LOG": tiling.run.bit_length() - 1,
            "BITS": tiling.bits,
        }

    def _recount(self, largest: float) -> torch.Tensor:
        """All errors by exponent, the largest of which is `largest`: `[EXPONENTS]`, on the device."""
        from divergence.comparison.triton_recount import recount

        matrix, tiling = self.matrix, self.plan.tiling
        histogram = torch.zeros(EXPONENTS, dtype=torch.int64, device=matrix.device)
        top = math.frexp(largest)[1] + 1022
        with _on(matrix.device):
            for launch in self.plan.launches:
                recount[(launch.programs,)](
                    *self._sides(1), self.mask, matrix.heads, matrix.tokens, matrix.channels,
                    *self._part(launch), top, histogram, **self._constants(), num_warps=tiling.threads // 32,
                )  # fmt: skip
        return histogram

    def metrics(self) -> Metrics:
        """The metrics that follow from what was found."""
        matrix = self.matrix
        # Page-locked memory takes several times as much a second.
        host = torch.empty(self.buffer.shape, dtype=torch.int64, pin_memory=self.buffer.is_cuda)
        parts = self.parts(host.copy_(self.buffer))
        histogram, token_lost, channel_lost, head_lost, *_, token, channel, head = (
            part.numpy() for part in parts
        )
        figures, numbers = (part.tolist() for part in _together(parts[6], parts[5]))
        total, worst, ref_low, ref_high, cand_low, cand_high, padded, _ = figures
        place, ref_nonfinite, cand_nonfinite, flags = numbers
        sums = arrange(
            matrix.form,
            _moments(self.token.members * matrix.columns - token_lost, token),
            _moments(self.head.members * (matrix.channels * matrix.rows) - head_lost, head),
            _moments(self.channel.members * matrix.rows - channel_lost, channel),
        )
        if flags & kernel.MISCOUNTED.value:
            histogram = self._recount(worst).cpu().numpy()
        histogram[0] = matrix.rows * matrix.columns - int(token_lost.sum()) - int(histogram.sum())
        valid = matrix.rows if matrix.mask is None else int(matrix.mask.sum())
        scan = Scan(
            elements=valid * matrix.columns,
            ref_nonfinite=ref_nonfinite,
            cand_nonfinite=cand_nonfinite,
            bit_equal=matrix.same_dtype and not flags & 1,
            abs_sum=total,
            max_abs=(worst, self._index(place)) if worst >= 0 else None,
            ref_range=(ref_low, ref_high) if ref_low <= ref_high else None,
            cand_range=(cand_low, cand_high) if cand_low <= cand_high else None,
            padded_max_abs=padded if padded >= 0 else None,
            error_exponents=histogram,
        )
        return with_unlike(assemble(scan, sums), self.given)

    def _index(self, number: int) -> tuple[int, ...]:
        return self.matrix.form.index(*(int(i) for i in np.unravel_index(number, self.matrix.form.pooled)))


def _summed(parts: torch.Tensor) -> torch.Tensor:
    """The sum over the first axis, which is kept; one part is no other tensor."""
    return parts if len(parts) == 1 else parts.sum(0, keepdim=True)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the device that is current, whatever device the tensors are on: another one's stream
    waits for nothing that they are waiting for."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _together(floats: torch.Tensor, integers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The figures of several programs as those of one (see `triton_parts.FLOATS`)."""
    f = floats.view(-1, kernel.FLOATS.value).T
    i = integers.view(-1, kernel.INTEGERS.value).T
    worst = f[1].max()
    place = torch.where(f[1] == worst, i[0], kernel.NOWHERE.value).min()
    flags = (i[3] & 1).max() + (i[3] & kernel.MISCOUNTED.value).max()
    figures = [
        f[0].sum(),
        worst,
        f[2].min(),
        f[3].max(),
        f[4].min(),
        f[5].max(),
        f[6].max(),
        worst.new_zeros(()),
    ]
    return torch.stack(figures), torch.stack([place, i[1].sum(), i[2].sum(), flags])


def _moments(count: Any, sums: Any) -> Floats:
    """The fields of `metrics.AxisSums` of an axis, `[5, entries]`."""
    return np.concatenate([count[None].astype(np.float64), sums.reshape(-1, 4).T])


def _masks(matrix: Matrix, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """On the device, whether each row is valid, and whether all rows of each program are; uint8."""
    if matrix.mask is None:
        nothing = table(torch.bool, matrix.device)
        return nothing, nothing
    valid = matrix.mask.reshape(-1).to(torch.uint8)
    whole = torch.nn.functional.pad(valid, (0, -len(valid) % depth), value=1).view(-1, depth).amin(1)
    both = torch.cat([valid, whole]).to(matrix.device)
    return both[: len(valid)], both[len(valid) :]
