"""What comparing two tensors of 4 GiB on a GPU costs: against a copy, and against a bare reduction.

The budget: bytes of both tensors by time are at least 85 % of the bandwidth of a copy (bytes read and
written) for float32, 75 % for bfloat16, with less than 64 MiB beside the tensors. The bare reduction finds
seven figures with float32 accumulators and nothing else: what one pass takes at least.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.support.measure import median_seconds
from divergence.comparison import compare_tensors

BYTES = 4 << 30
RUNS = 7
SHAPES = {"heads": (1, 32, -1, 4096), "hidden": (1, -1, 4096)}
SMALL = ((1, 8, 256, 64), (1, 970, 2048))


def pair(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors of `BYTES` each on the device, or as large as `shape` says."""
    given = math.prod(size for size in shape if size > 0)
    shape = tuple(BYTES // dtype.itemsize // given if size == -1 else size for size in shape)
    generator = torch.Generator("cuda").manual_seed(0)
    ref = torch.empty(shape, dtype=dtype, device="cuda").normal_(generator=generator)
    cand = torch.empty_like(ref)
    flat, other = ref.view(-1), cand.view(-1)
    for start in range(
        0, flat.numel(), 1 << 26
    ):  # in pieces: float32 values of all would take more than is there
        part = flat[start : start + (1 << 26)].float()
        noise = torch.empty_like(part).normal_(generator=generator)
        other[start : start + (1 << 26)] = (part + 1e-2 * noise * part.abs()).to(dtype)
    return ref, cand


def milliseconds(work: Callable[[], Any], runs: int = RUNS) -> float:
    """Median of several runs by the device's clock, after one to warm up.

    The device has other work to do first, so that it does not wait for the host.
    """
    scratch = torch.empty(1 << 28, device="cuda")
    work()
    times = []
    for _ in range(runs):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(8):
            scratch.fill_(0)
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def bare() -> Callable[[torch.Tensor, torch.Tensor], Any]:
    """Seven figures of two contiguous tensors with float32 accumulators."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(ref, cand, out, steps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        program = tl.program_id(0).to(tl.int64)
        err2 = tl.zeros((BLOCK,), tl.float32)
        ref2, cand2, dot, absolute = err2, err2, err2, err2
        largest, bad = err2, err2
        at = ref + program * steps * BLOCK + tl.arange(0, BLOCK)
        other = cand + program * steps * BLOCK + tl.arange(0, BLOCK)
        for _ in range(steps):
            r, c = tl.load(at).to(tl.float32), tl.load(other).to(tl.float32)
            d = c - r
            err2 += d * d
            ref2 += r * r
            cand2 += c * c
            dot += r * c
            absolute += tl.abs(d)
            largest = tl.maximum(largest, tl.abs(d))
            bad += (d != d).to(tl.float32)
            at += BLOCK
            other += BLOCK
        out += program * 8
        tl.store(out, tl.sum(err2))
        tl.store(out + 1, tl.sum(ref2))
        tl.store(out + 2, tl.sum(cand2))
        tl.store(out + 3, tl.sum(dot))
        tl.store(out + 4, tl.sum(absolute))
        tl.store(out + 5, tl.max(largest))
        tl.store(out + 6, tl.sum(bad))

    def run(ref: torch.Tensor, cand: torch.Tensor) -> torch.Tensor:
        block, steps = 4096, 64
        programs = ref.numel() // (block * steps)
        out = torch.empty((programs, 8), device="cuda")
        kernel[(programs,)](ref, cand, out, steps, BLOCK=block, num_warps=8)
        return out.sum(0)

    return run


def large() -> None:
    """Prints the table of large tensors."""
    reduce = bare()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, 2 x {BYTES >> 30} GiB, median of {RUNS}"
    )
    print(f"{'':40} {'ms':>8} {'TB/s':>7} {'% of copy':>10}")
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            measure(f"{name}, {str(dtype).removeprefix('torch.')}", *pair(shape, dtype), reduce)


def measure(label: str, ref: torch.Tensor, cand: torch.Tensor, reduce: Callable[..., Any]) -> None:
    """Prints the rows of one pair. A call is the device's work and what the host makes of the results."""
    copied = _copy(ref)
    rows = {
        "copy": copied,
        "seven figures": milliseconds(lambda: reduce(ref, cand)),
        "compare, on the device": milliseconds(lambda: gpu.launch(ref, cand)),
        "compare, a call": 1e3 * median_seconds(lambda: compare_tensors(ref, cand), RUNS),
    }
    for what, ms in rows.items():
        speed = 2 * BYTES / ms / 1e9
        print(f"{label + ', ' + what:40} {ms:8.3f} {speed:7.3f} {copied / ms * 100:10.1f}", flush=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    compare_tensors(ref, cand)
    print(f"{label}, MiB beside: {(torch.cuda.max_memory_allocated() - before) / 2**20:.1f}")
    cand.view(-1)[0] = 2.0**80  # errors of more powers of two than are counted at once
    ms = 1e3 * median_seconds(lambda: compare_tensors(ref, cand), 3)
    print(f"{label}, a call with a recount: {ms:.3f} ms")


def _copy(ref: torch.Tensor) -> float:
    target = torch.empty_like(ref)
    return milliseconds(lambda: target.copy_(ref))


def small() -> None:
    """Prints what a call costs on tensors of usual sizes."""
    for shape in SMALL:
        for dtype in (torch.float32, torch.bfloat16):
            ref, cand = pair(shape, dtype)
            compare_tensors(ref, cand)
            times = []
            for _ in range(200):
                start = time.perf_counter()
                compare_tensors(ref, cand)
                times.append((time.perf_counter() - start) * 1e3)
            least, middle = min(times), statistics.median(times)
            print(f"a call on {list(shape)} {dtype}: least {least:.3f}, median {middle:.3f} ms")


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("no CUDA device: not measured")
        sys.exit()
    # Imports Triton.
    from divergence.comparison import gpu

    small()
    large()
