"""What capturing costs over a plain forward, in time and in memory, to disk and within a memory budget.

    python benchmarks/capture.py [--tokens 128] [--runs 3] [--skip-large]

On the CPU SmolLM2-135M and a stack of 2 G parameters in fp32; on a CUDA device 8 layers of that stack, 970
tokens. Plain and captured runs take turns. Budgets: 1.5 times a plain forward on the CPU, 1.2 on the GPU, and
512 MiB of host memory over its peak.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.support.measure import count_peak_anew, held, seconds
from benchmarks.tensorrt import gemma
from divergence.budget import Budget
from divergence.captures import Capture
from divergence.probes import silent
from divergence.probes.pytorch import PyTorchProbe
from divergence.room import host_memory
from divergence.setting import record
from tests import smollm2

MEMORY = 512 << 20
ROOM = 12 << 30
Case = tuple[str, nn.Module, Mapping[str, Tensor]]


def cases(tokens: int, *, large: bool) -> Iterator[Case]:
    """Models, with inputs."""
    if smollm2.available():
        yield f"SmolLM2-135M, CPU, {tokens} tokens", smollm2.load(), smollm2.inputs(tokens)
    free = host_memory()
    if large and free is not None and free < ROOM:
        print(f"2 G parameters, CPU: left out, {free >> 30} GiB are free and it takes {ROOM >> 30}")
    elif large:
        gemma.SIZES["full"] = replace(gemma.SIZES["full"], tokens=tokens)
        yield f"2 G parameters, CPU, {tokens} tokens", gemma.make("full", "cpu"), gemma.inputs("full")
    if torch.cuda.is_available():
        gemma.SIZES["full"] = replace(gemma.SIZES["full"], layers=8, tokens=970)
        for dtype in (torch.float32, torch.bfloat16):
            model = gemma.make("full").to(dtype)
            given = {n: t.to(dtype) if t.is_floating_point() else t for n, t in gemma.inputs("full").items()}
            name = f"8 layers of hidden 2048, {torch.cuda.get_device_name()}, {dtype}, 970 tokens"
            yield name, model, {n: t.cuda() for n, t in given.items()}


def plain(model: nn.Module, inputs: Mapping[str, Tensor], _: Path) -> None:
    """A forward."""
    with torch.inference_mode():
        model(**inputs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def captured(budget: int | None, model: nn.Module, inputs: Mapping[str, Tensor], folder: Path) -> Capture:
    """A capture into a folder, or into memory as far as it fits."""
    return record(
        PyTorchProbe(model),
        inputs,
        folder / "run.capture",
        detail=False,
        progress=silent,
        budget=None if budget is None else Budget(budget),
    )


def timed(job: Callable[[Path], Any]) -> float:
    """Seconds of a run; what it leaves is deleted afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        left: list[Any] = []
        taken = seconds(lambda: left.append(job(Path(folder))))
        left.clear()
    return taken


def peak(work: Callable[[], Any]) -> float:
    """Most memory that this process holds during `work`, in MiB (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs have freed would hide what this one takes
    count_peak_anew()
    work()
    return held("VmHWM")


def main() -> None:
    """Prints a table for each model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=128, help="on the CPU")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--skip-large", action="store_true", help="leave out 2 G parameters (8 GB) on the CPU"
    )
    args = parser.parse_args()
    for name, model, inputs in cases(args.tokens, large=not args.skip_large):
        jobs: dict[str, Callable[[Path], Any]] = {
            "plain forward": functools.partial(plain, model, inputs),
            "capture to disk": functools.partial(captured, None, model, inputs),
            "capture within 512 MiB": functools.partial(captured, MEMORY, model, inputs),
        }
        for job in jobs.values():
            timed(job)
        most = {what: peak(functools.partial(timed, job)) for what, job in jobs.items()}
        taken: dict[str, list[float]] = {what: [] for what in jobs}
        for _ in range(args.runs):
            for what, job in jobs.items():
                taken[what].append(timed(job))
        print(f"{name}, {torch.get_num_threads()} threads, median of {args.runs} in turn")
        base = statistics.median(taken["plain forward"])
        for what, times in taken.items():
            middle = statistics.median(times)
            over = most[what] - most["plain forward"]
            print(
                f"  {what:24} {middle * 1e3:9.1f} ms {middle / base:5.2f}x {over:7.0f} MiB over plain",
                flush=True,
            )
        del model, inputs, jobs


if __name__ == "__main__":
    main()
