"""How a matrix is shared out to launches and programs of the GPU kernel."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from divergence.comparison import triton_parts as kernel

if TYPE_CHECKING:
    from divergence.comparison.matrix import Matrix

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


def suitable(matrix: Matrix) -> Tiling:
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
class Launch:
    """A part of the matrix that is gone over at once: its number, its programs, the number of the first."""

    number: int
    rows: range
    columns: range
    first: int
    programs: int


@dataclass(frozen=True)
class Plan:
    """How a matrix is gone over."""

    tiling: Tiling
    launches: list[Launch]

    @classmethod
    def of(cls, matrix: Matrix, tiling: Tiling, memory: tuple[int, int]) -> Plan:
        """Launches whose partial sums fit into memory."""
        for_rows, for_columns = (most // SUMS_BYTES for most in memory)
        width = tiling.width
        columns = min(matrix.columns, max(1, for_columns // width) * width)
        strips = -(-columns // width)
        most = _Most(
            rows=max(tiling.rows, for_rows // strips),
            blocks=max(1, for_columns // columns),
            depth=kernel.most_counted(tiling.bits) // tiling.run // tiling.rows * tiling.rows,
        )
        blocks, depth = _share(matrix.rows, strips, tiling, most, _resident(matrix.device, tiling))
        step = depth * blocks
        launches: list[Launch] = []
        first = 0
        for row, column in itertools.product(range(0, matrix.rows, step), range(0, matrix.columns, columns)):
            part = (
                range(row, min(row + step, matrix.rows)),
                range(column, min(column + columns, matrix.columns)),
            )
            programs = -(-len(part[0]) // depth) * -(-len(part[1]) // width)
            launches.append(Launch(len(launches), *part, first, programs))
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


@lru_cache
def _resident(device: torch.device, tiling: Tiling) -> int:
    """Programs that the device runs at a time."""
    if device.type != "cuda":
        return 1
    each = max(1, (1 << 16) // (tiling.registers * tiling.threads))
    return int(torch.cuda.get_device_properties(device).multi_processor_count) * each
