"""What comparing two tensors of 256 MiB on the CPU costs: against reading both, and against Polygraphy.

Rows are measured in turn, so that a busy machine slows all of them alike. The budget: 3 times the time of
reading both with the same threads, for half-precision tensors of as many bytes 4.5 times; 64 MiB beside them.
A bare loop of seven figures shows what compiled code takes that finds less. Polygraphy is measured where it
is installed (the extra `bench`).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.support.bare_loop import bare
from benchmarks.support.measure import count_peak_anew, held, seconds
from divergence.comparison import compare_tensors

BYTES = 256 << 20
RUNS = 15
SMALL = (1, 128, 576)
FIRST_CALL = """
import torch
x = torch.ones(1, 128, 576)
import time
start = time.perf_counter()
from divergence.comparison import compare_tensors
compare_tensors(x, x)
print(time.perf_counter() - start)
"""


def pair(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors `[1, token, 4096]` of `BYTES` each."""
    ref = torch.randn(1, BYTES // dtype.itemsize // 4096, 4096, generator=torch.Generator().manual_seed(0))
    cand = ref + 1e-3 * torch.randn(ref.shape, generator=torch.Generator().manual_seed(1))
    return ref.to(dtype), cand.to(dtype)


def large() -> None:
    """Prints the table of large tensors."""
    tensors = {str(d).removeprefix("torch."): pair(d) for d in (torch.float32, torch.bfloat16, torch.float16)}
    ref, cand = tensors["float32"]
    compare_tensors(ref[:, :1], cand[:, :1])
    count_peak_anew()
    before = held("VmRSS")
    compare_tensors(ref, cand)
    extra = held("VmHWM") - before
    jobs: dict[str, Callable[[], Any]] = {"torch.sum of both, float32": lambda: (ref.sum(), cand.sum())}
    jobs["a loop of seven figures"] = bare(ref, cand)
    for name, (one, other) in tensors.items():
        jobs[f"compare, {name}"] = lambda one=one, other=other: compare_tensors(one, other)  # type: ignore[misc]
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(RUNS):
        for name, job in jobs.items():
            taken[name].append(seconds(job))
    print(f"2 x {BYTES >> 20} MiB, {torch.get_num_threads()} threads, {RUNS} runs in turn, milliseconds")
    print(f"{'':28} {'least':>8} {'median':>8} {'/ sum, least':>13} {'/ sum, median':>14}")
    base = next(iter(taken.values()))
    for name, times in taken.items():
        least, middle = min(times), statistics.median(times)
        ratios = f"{least / min(base):13.2f} {middle / statistics.median(base):14.2f}"
        print(f"{name:28} {least * 1e3:8.1f} {middle * 1e3:8.1f} {ratios}")
    print(f"memory beside the tensors, float32: {extra:.1f} MiB")
    polygraphy(ref, cand, statistics.median(taken["compare, float32"]))


def polygraphy(ref: torch.Tensor, cand: torch.Tensor, ours: float) -> None:
    """Prints what Polygraphy's `simple` comparison of the same tensors takes."""
    try:
        from polygraphy.comparator import CompareFunc, IterationResult
        from polygraphy.logger import G_LOGGER
    except ImportError:
        print("polygraphy is not installed: not compared with it")
        return
    one, other = (
        IterationResult(outputs={"x": t.numpy()}, runner_name=n) for t, n in ((ref, "a"), (cand, "b"))
    )
    count_peak_anew()
    before = held("VmRSS")
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        theirs = seconds(lambda: CompareFunc.simple()(one, other))
    extra = held("VmHWM") - before
    print(f"polygraphy, simple: {theirs:.1f} s, {theirs / ours:.0f} times ours, {extra:.0f} MiB beside")


def small() -> None:
    """Prints what a call costs on a tensor of the usual size, and the first one of a process."""
    ref = torch.randn(SMALL, generator=torch.Generator().manual_seed(0))
    cand = ref + 1e-3
    times = [seconds(lambda: compare_tensors(ref, cand)) * 1e3 for _ in range(500)]
    print(
        f"a call on {list(SMALL)} float32: least {min(times):.3f}, median {statistics.median(times):.3f} ms"
    )
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        for what in ("nothing cached", "cached", "cached"):
            done = subprocess.run(
                [sys.executable, "-c", FIRST_CALL],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            print(f"first call of a process with its imports, {what}: {float(done.stdout):.2f} s")


if __name__ == "__main__":
    small()
    large()
