"""What a start costs: processes that import a library and leave, against one that imports nothing.

The budget of `import divergence` and `divergence --help` is 0.3 s each.
"""

from __future__ import annotations

import importlib.util
import resource
import statistics
import subprocess
import sys
import time

REPEATS = 15
STATEMENTS = {
    "nothing": "pass",
    "argparse": "import argparse",
    "click": "import click",
    "typer": "import typer",
    "rich, as a console": "from rich.console import Console",
    "divergence": "import divergence",
    "divergence --help": "from divergence.cli import main; main(['--help'])",
}


def _seconds(statement: str) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a process; the second is the steadier one on a busy machine."""
    used, start = _used(), time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], stdout=subprocess.DEVNULL, check=False)
    return time.perf_counter() - start, _used() - used


def _used() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Prints medians and the least wall-clock time of each, in seconds."""
    print(f"{'process':20} {'wall s':>8} {'least s':>8} {'CPU s':>8}")
    for name, statement in STATEMENTS.items():
        if name == "typer" and not importlib.util.find_spec("typer"):
            continue
        _seconds(statement)
        wall, cpu = zip(*(_seconds(statement) for _ in range(REPEATS)), strict=True)
        print(f"{name:20} {statistics.median(wall):8.3f} {min(wall):8.3f} {statistics.median(cpu):8.3f}")


if __name__ == "__main__":
    main()
