"""Progress of long work on a stream, usually standard error: a bar on a terminal, elsewhere at most
a line for every stage that takes long."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

from divergence.probes import Progress
from divergence.reports import plain

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

LONG = 2.0
"""Seconds from which a stage is worth a line."""


@contextlib.contextmanager
def progress(
    stream: TextIO,
    enabled: bool,  # noqa: FBT001 (the one choice)
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Progress]:
    """Gives a `Progress` that shows on `stream` what is going on, for as long as the context lasts.

    Args:
        stream: where to show it; nothing is written elsewhere.
        enabled: draw a bar that moves, if `stream` is a terminal, and wipe it in the end; otherwise
            a stage is worth a plain line when it has taken more than `LONG` seconds.
        clock: seconds, for the stages' durations.
    """
    if enabled and stream.isatty():
        with _bars(stream) as bars:
            yield _Stages(bars)
    else:
        lines = _Lines(stream, clock)
        try:
            yield lines
        finally:
            lines.finish()


def _bars(stream: TextIO) -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(file=stream),
        transient=True,
        # Otherwise what is printed to standard output meanwhile would end up on `stream`.
        redirect_stdout=False,
        redirect_stderr=False,
    )


class _Stages:
    """Shows the stage that is under way as a bar; the previous one makes room for it."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._label: str | None = None
        self._task: TaskID | None = None

    def __call__(self, label: str, done: int, total: int) -> None:
        if self._task is None or label != self._label:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = self._bars.add_task(plain(label), total=total or None)
            self._label = label
        self._bars.update(self._task, completed=done, total=total or None)


class _Lines:
    """Writes one line for a stage as soon as it is known to be long."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._clock = clock
        self._label: str | None = None
        self._since = 0.0
        self._written = False

    def __call__(self, label: str, done: int, total: int) -> None:
        if label != self._label:
            self.finish()
            self._label, self._since, self._written = label, self._clock(), False
        elif self._is_long():
            self._write(f"{done} of {total}" if total else "under way")

    def finish(self) -> None:
        """Ends the stage under way."""
        if self._label is not None and self._is_long():
            self._write(f"took {self._clock() - self._since:.0f} s")

    def _is_long(self) -> bool:
        return not self._written and self._clock() - self._since > LONG

    def _write(self, state: str) -> None:
        self._stream.write(f"{plain(self._label)}: {state}\n")
        self._stream.flush()
        self._written = True
