"""What a start costs: processes that import a library and leave, against one that imports nothing.

The budget of `import divergence` and `divergence --help` is 0.3 s each.
"""

from __future__ import annotations

import importlib.util
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


def _seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], stdout=subprocess.DEVNULL, check=False)
    return time.perf_counter() - start


def main() -> None:
    """Prints the median and the least time of each, in seconds."""
    print(f"{'process':20} {'median s':>9} {'least s':>8}")
    for name, statement in STATEMENTS.items():
        if name == "typer" and not importlib.util.find_spec("typer"):
            continue
        _seconds(statement)
        times = [_seconds(statement) for _ in range(REPEATS)]
        print(f"{name:20} {statistics.median(times):9.3f} {min(times):8.3f}")


if __name__ == "__main__":
    main()
