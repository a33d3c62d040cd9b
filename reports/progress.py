"""Progress of long work on stderr; never on stdout."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import IO

from divergence.probes import Progress

# Without a terminal a stage is worth a line of its own after this many seconds.
_QUIET_SECONDS = 2.0


@contextlib.contextmanager
def progress(stream: IO[str], enabled: bool) -> Iterator[Progress]:
    """Shows what is going on.

    Args:
        stream: where to, usually stderr.
        enabled: draw a moving display (a terminal); otherwise a plain line for every stage that
            starts after the work has lasted two seconds.
    """
    if not enabled:
        yield _Lines(stream)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Display

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Display(*columns, console=Console(file=stream), transient=True) as display:
        task = display.add_task("", total=None)

        def show(label: str, done: int, total: int) -> None:
            display.update(task, description=label, completed=done, total=total or None)

        yield show


class _Lines:
    """A line a stage, for logs."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._started = time.monotonic()
        self._label = ""

    def __call__(self, label: str, done: int, total: int) -> None:
        if label == self._label or time.monotonic() - self._started < _QUIET_SECONDS:
            return
        self._label = label
        print(f"{label} ...", file=self._stream, flush=True)
