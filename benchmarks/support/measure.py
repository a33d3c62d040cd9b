"""Time and memory of this process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def seconds(work: Callable[[], Any]) -> float:
    """Wall clock of one run."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def median_seconds(work: Callable[[], Any], runs: int) -> float:
    """Median wall clock over `runs` runs, after one that is not counted."""
    return statistics.median([seconds(work) for _ in range(runs + 1)][1:])


def count_peak_anew() -> None:
    """Lets `held("VmHWM")` forget what was held before (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def held(what: str) -> float:
    """Memory of this process in MiB: `VmRSS` now, `VmHWM` at most (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:")) / 1024
