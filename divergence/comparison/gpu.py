"""Comparison on a GPU: both tensors are read once, where they are, by a Triton kernel (`triton_kernel`).

Nothing but results is copied to the host, in one piece. Beside the tensors there are partial sums
(`ROW_BYTES`, `COLUMN_BYTES`) and the results: a tensor whose partial sums would take more is gone over in
several launches. All sums are in float64 and are added up in an order that depends on shapes and dtypes
only: a call gives the same bits each time. It is another order than on the CPU: figures agree with the
definitions, and so with the CPU, to a relative 1e-12.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from divergence.comparison import triton_parts as kernel
from divergence.comparison.metrics import EXPONENTS, PROFILE_ENTRIES, Floats, Metrics, Scan, arrange, assemble
from divergence.comparison.triton_kernel import compare as compare_matrices
from divergence.comparison.views import Form, Operands, byte_values, operands

if TYPE_CHECKING:
    from divergence.comparison.views import Values

ROW_BYTES = 36 << 20
"""Most bytes of partial sums of rows."""

COLUMN_BYTES = 13 << 20
"""Most bytes of partial sums of columns."""

SUMS_BYTES = 32
"""Of the four sums of a row or column."""

LEAST_DEPTH = 16
"""Least rows of a program by default: each writes sums of its columns."""

END_ROWS = 24
"""What the end of a strip costs, and a launch, in rows of a strip."""

MOST_FIGURES = 1 << 14
"""Programs whose figures are kept to the end; of more, those of each launch are put together after it."""

LONGEST = (1 << 31) - (1 << 20)
"""Rows and columns that can be numbered in int32, with room for those that are cut off."""

INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""What the kernel is given, by bytes of an element."""

FLOATS = {
    torch.float32: int(kernel.FLOAT32.value),
    torch.float64: int(kernel.FLOAT64.value),
    torch.bfloat16: int(kernel.BFLOAT16.value),
    torch.float16: int(kernel.FLOAT16.value),
}
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)

WIDE = (torch.float64, torch.int32, torch.int64, torch.uint32, torch.uint64)
"""Those that float32 cannot hold exactly."""


@dataclass(frozen=True)
class Tiling:
    """How a matrix is shared out to programs.

    Attributes:
        threads: of a program, a multiple of 32.
        run: consecutive columns of a thread.
        rows: that are worked on at a time: 1, 2 or 4.
        depth: rows of a program, a multiple of `rows`; 0 for as many as share the rows out evenly.
        bits: of the words that errors are counted in, 32 or 64.
        stages: steps of `rows` whose values are on their way at a time, if the device can.
        registers: of a thread; a multiprocessor has 2^16, and runs as many threads as these are enough for.
    """

    threads: int
    run: int
    rows: int
    depth: int
    bits: int
    stages: int = 4
    registers: int = 168

    @property
    def width(self) -> int:
        """Columns of a program."""
        return self.threads * self.run


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
    pair = _pair(given)
    if pair is None:
        return None
    matrix = _Matrix(given.form, given.mask, *pair)
    plan = _Plan.of(matrix, tiling or _tiling(matrix), memory)
    results = Results(matrix, plan, entries)
    for part in plan.launches:
        results.run(part)
    return results


def _pair(given: Operands) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Both tensors as `[batch, head, token, channel]`, or None where the kernel cannot compare them."""
    form = given.form
    batch, heads, tokens, channels = form.pooled
    if max(batch * tokens, heads * channels) > LONGEST:
        return None
    try:
        for tensor in (given.ref, given.cand):
            _stored(tensor.dtype)
        return form.view(given.ref).view(form.pooled), form.view(given.cand).view(form.pooled)
    except RuntimeError:
        return None


class _Matrix:
    """Two tensors as matrices: rows are tokens of all batches, columns channels of all heads."""

    def __init__(self, form: Form, mask: torch.Tensor | None, ref: torch.Tensor, cand: torch.Tensor) -> None:
        self.form = form
        self.mask = mask
        self.sides = (ref, cand)
        self.device = ref.device
        self.batch, self.heads, self.tokens, self.channels = form.pooled
        self.rows = self.batch * self.tokens
        self.columns = self.heads * self.channels
        self.same_dtype = ref.dtype == cand.dtype
        # Threads and columns correspond where both sides are read alike.
        self.native = (
            self.device.type == "cuda"
            and torch.version.hip is None
            and ref.element_size() == cand.element_size()
        )
        self.wide = ref.dtype in WIDE or cand.dtype in WIDE
        self.flat = sum(
            flag << place
            for place, flag in enumerate(
                (*map(self._rows_flat, self.sides), *map(self._columns_flat, self.sides))
            )
        )

    def steps(self, side: torch.Tensor) -> tuple[int, int, int, int]:
        """Strides of batch, head, token and channel; of an axis of one member, that of the outer one."""
        batch, head, token, channel = side.stride()
        return batch, head, batch if self.tokens == 1 else token, head if self.channels == 1 else channel

    def _rows_flat(self, side: torch.Tensor) -> bool:
        batch, _, token, _ = side.stride()
        return 1 in {self.batch, self.tokens} or batch == self.tokens * token

    def _columns_flat(self, side: torch.Tensor) -> bool:
        _, head, _, channel = side.stride()
        return 1 in {self.heads, self.channels} or head == self.channels * channel

    def aligned(self, side: torch.Tensor) -> bool:
        """Whether runs of columns can be read 16 bytes at a time."""
        *outer, channel = self.steps(side)
        sizes = (self.batch, self.heads, self.tokens)
        return (
            channel == 1
            and side.data_ptr() % 16 == 0
            and all(step % 16 == 0 for step, size in zip(outer, sizes, strict=True) if size > 1)
            and (self.channels % 16 == 0 or self.heads == 1)
        )


def _tiling(matrix: _Matrix) -> Tiling:
    """What suits shape and dtypes: 16 bytes of a thread at a time, and no more threads than columns need."""
    size = max(side.element_size() for side in matrix.sides)
    run = min(8, 16 // size)
    half = size <= 2
    bits, registers, most = (32, 255, 64) if half else (64, 168, 128)
    threads = min(most, max(32, _power(matrix.columns) // run))
    run = min(run, _power(-(-matrix.columns // threads)))
    while matrix.heads > 1 and matrix.channels % run:
        run //= 2  # what a thread reads of a row must lie in one head (see `worst_at` in the kernel)
    return Tiling(threads, run, 4 if half else 2, 0, bits, 3 if half else 4, registers)


def _power(n: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class _Launch:
    """A part of the matrix that is gone over at once: its number, its programs, the number of the first."""

    number: int
    rows: range
    columns: range
    first: int
    programs: int


@dataclass(frozen=True)
class _Plan:
    """How a matrix is gone over."""

    tiling: Tiling
    launches: list[_Launch]

    @classmethod
    def of(cls, matrix: _Matrix, tiling: Tiling, memory: tuple[int, int]) -> _Plan:
        """Launches whose partial sums fit into memory."""
        for_rows, for_columns = (most // SUMS_BYTES for most in memory)
        width = tiling.width
        columns = min(matrix.columns, max(1, for_columns // width) * width)
        strips = -(-columns // width)
        most = _Most(
            rows=max(tiling.rows, for_rows // strips),
            blocks=max(1, for_columns // columns),
            depth=kernel.MOST_COUNTED // tiling.run // tiling.rows * tiling.rows,
        )
        blocks, depth = _share(matrix.rows, strips, tiling, most, _resident(matrix.device, tiling))
        step = depth * blocks
        launches: list[_Launch] = []
        first = 0
        for row, column in itertools.product(range(0, matrix.rows, step), range(0, matrix.columns, columns)):
            part = (
                range(row, min(row + step, matrix.rows)),
                range(column, min(column + columns, matrix.columns)),
            )
            programs = -(-len(part[0]) // depth) * -(-len(part[1]) // width)
            launches.append(_Launch(len(launches), *part, first, programs))
            first += programs
        return cls(replace(tiling, depth=depth), launches)

    @property
    def programs(self) -> int:
        """Of all launches."""
        return self.launches[-1].first + self.launches[-1].programs


@dataclass(frozen=True)
class _Most:
    """What a launch (rows, blocks of rows) and a program (depth) can have."""

    rows: int
    blocks: int
    depth: int


def _share(rows: int, strips: int, tiling: Tiling, most: _Most, resident: int) -> tuple[int, int]:
    """Blocks of a launch and rows of each with which all is done soonest, `resident` programs at a time."""
    found = {}
    for programs in range(resident, 9 * resident, resident):
        blocks = min(most.blocks, max(1, programs // strips))
        depth = min(most.depth, max(tiling.rows, most.rows // blocks // tiling.rows * tiling.rows))
        launches = -(-rows // (blocks * depth))
        even = max(LEAST_DEPTH, -(-rows // (launches * blocks)))
        depth = min(depth, -(-(tiling.depth or even) // tiling.rows) * tiling.rows)
        blocks = min(blocks, -(-rows // depth))
        launches = -(-rows // (blocks * depth))
        waves = -(-blocks * strips // resident)
        found[blocks, depth] = launches * (waves * (depth + END_ROWS) + END_ROWS)
    return min(found, key=lambda pair: (found[pair], pair))


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
            sums = torch.nn.functional.pad(sums.sum(0, keepdim=True), (0, 0, before, behind))
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

    def __init__(self, matrix: _Matrix, plan: _Plan, entries: int) -> None:
        self.matrix, self.plan = matrix, plan
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

    def run(self, launch: _Launch) -> None:
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
        by_column = column_sums.view(blocks, -1, 4).sum(0, keepdim=True)
        self.channel.add(by_column, launch.columns.start, channel.view(-1, 4))
        if matrix.form.has_head:
            self.head.add(by_column, launch.columns.start, head.view(-1, 4))

    def _sides(self, unit: int) -> list[Any]:
        """Both sides for a kernel: address, steps in units of `unit`, values of bytes."""
        sides: list[Any] = []
        for side in self.matrix.sides:
            steps = (step // unit for step in self.matrix.steps(side))
            sides += [side.view(INTEGER[side.element_size()]), *steps, _table(side.dtype, self.matrix.device)]
        return sides

    def _part(self, launch: _Launch) -> tuple[int, ...]:
        return (
            *(launch.rows.start, launch.rows.stop),
            *(launch.columns.start // 32, launch.columns.stop),
            self.plan.tiling.depth,
        )

    def _constants(self) -> dict[str, Any]:
        ref, cand = self.matrix.sides
        tiling = self.plan.tiling
        return {
            "REF": _stored(ref.dtype),
            "CAND": _stored(cand.dtype),
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
        parts = [part.numpy() for part in self.parts(host.copy_(self.buffer))]
        histogram, token_lost, channel_lost, head_lost, _, integers, floats, token, channel, head = parts
        sums = arrange(
            matrix.form,
            _moments(self.token.members * matrix.columns - token_lost, token),
            _moments(self.head.members * (matrix.channels * matrix.rows) - head_lost, head),
            _moments(self.channel.members * matrix.rows - channel_lost, channel),
        )
        numbers = integers.reshape(-1, kernel.INTEGERS.value)
        figures = floats.reshape(-1, kernel.FLOATS.value)
        compared = matrix.rows * matrix.columns - int(token_lost.sum())
        worst, padded = float(figures[:, 1].max()), float(figures[:, 6].max())
        if (numbers[:, 3] >= kernel.MISCOUNTED.value).any():
            histogram = self._recount(worst).cpu().numpy()
        histogram[0] = compared - int(histogram.sum())
        valid = matrix.rows if matrix.mask is None else int(matrix.mask.sum())
        scan = Scan(
            elements=valid * matrix.columns,
            ref_nonfinite=int(numbers[:, 1].sum()),
            cand_nonfinite=int(numbers[:, 2].sum()),
            bit_equal=matrix.same_dtype and not (numbers[:, 3] & 1).any(),
            abs_sum=float(figures[:, 0].sum()),
            max_abs=(worst, self._index(int(numbers[figures[:, 1] == worst, 0].min())))
            if worst >= 0
            else None,
            ref_range=_range(figures[:, 2:4]),
            cand_range=_range(figures[:, 4:6]),
            padded_max_abs=padded if padded >= 0 else None,
            error_exponents=histogram,
        )
        return assemble(scan, sums)

    def _index(self, number: int) -> tuple[int, ...]:
        return self.matrix.form.index(*(int(i) for i in np.unravel_index(number, self.matrix.form.pooled)))


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


def _range(ranges: Floats) -> tuple[float, float] | None:
    low, high = float(ranges[:, 0].min()), float(ranges[:, 1].max())
    return (low, high) if low <= high else None


def _masks(matrix: _Matrix, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """On the device, whether each row is valid, and whether all rows of each program are; uint8."""
    if matrix.mask is None:
        nothing = _table(torch.bool, matrix.device)
        return nothing, nothing
    valid = matrix.mask.reshape(-1).to(torch.uint8)
    whole = torch.nn.functional.pad(valid, (0, -len(valid) % depth), value=1).view(-1, depth).amin(1)
    both = torch.cat([valid, whole]).to(matrix.device)
    return both[: len(valid)], both[len(valid) :]


def _stored(dtype: torch.dtype) -> int:
    """How the kernel reads a dtype.

    Raises:
        RuntimeError: it does not.
    """
    if dtype in FLOATS:
        return FLOATS[dtype]
    if dtype in SIGNED:
        return int(kernel.SIGNED.value)
    if dtype in UNSIGNED:
        return int(kernel.UNSIGNED.value)
    if dtype.itemsize > 1:
        raise RuntimeError(f"{dtype}")
    _table(dtype, torch.device("cpu"))
    return int(kernel.TABLE.value)


@lru_cache
def _table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The values of all 256 bit patterns of a dtype of one byte, float32; anything for others.

    Raises:
        RuntimeError: the dtype has no values of its own.
    """
    values = byte_values(dtype) if dtype.itemsize == 1 else np.zeros(256, np.float32)
    return torch.from_numpy(values).to(device)


@lru_cache
def _resident(device: torch.device, tiling: Tiling) -> int:
    """Programs that the device runs at a time."""
    if device.type != "cuda":
        return 1
    each = (1 << 16) // (tiling.registers * tiling.threads)
    return int(torch.cuda.get_device_properties(device).multi_processor_count) * each
