"""Reports of pairs, written in processes of their own while the next pairs are compared.

Drawing and writing the report of a pair takes a second or so of one core, whatever the size of the models:
with many workers on other machines, nothing else would decide how long many pairs take.
"""

from __future__ import annotations

import multiprocessing
import signal
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from divergence.reports import write_all
from divergence.result import Comparison
from divergence.working import cores

_MOST = 8
_WAITING = 2
"""Reports that are under way or wait, for each process; who adds another one waits."""


class Writers:
    """Processes that write reports; they start with the first one."""

    def __init__(self) -> None:
        self._written: set[Path] = set()
        self._under_way: dict[Future[list[Path]], tuple[Comparison, Path]] = {}
        self._processes = min(_MOST, cores())
        self._pool: ProcessPoolExecutor | None = None

    def add(self, comparison: Comparison, folder: Path) -> None:
        """Has the reports of `comparison` written into `folder`.

        Raises:
            OSError: those of an earlier one could not be written.
        """
        self._collect()
        while len(self._under_way) >= _WAITING * self._processes:
            wait(self._under_way, return_when=FIRST_COMPLETED)
            self._collect()
        if self._pool is None:
            # A fork would take along the threads and devices of this process.
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._processes, spawn, _leave_interrupts_to_the_command)
        try:
            self._under_way[self._pool.submit(write_all, comparison, folder)] = comparison, folder
        except BrokenProcessPool:
            self._write_here(comparison, folder)

    def finish(self) -> None:
        """Waits until all are written.

        Raises:
            OSError: one could not be.
        """
        wait(self._under_way)
        self._collect()

    def close(self) -> set[Path]:
        """Ends the processes: what is being written is completed, what waits is left out.

        Returns:
            The folders that are complete.
        """
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        for future, (_, folder) in self._under_way.items():
            if not future.cancelled() and future.exception() is None:
                self._written.add(folder)
        return self._written

    def _collect(self) -> None:
        for future in [future for future in self._under_way if future.done()]:
            comparison, folder = self._under_way.pop(future)
            try:
                future.result()
            except BrokenProcessPool:
                self._write_here(comparison, folder)
            self._written.add(folder)

    def _write_here(self, comparison: Comparison, folder: Path) -> None:
        """Where a process was killed, as for want of memory; the next report has new ones."""
        self._pool = None
        write_all(comparison, folder)
        self._written.add(folder)


def _leave_interrupts_to_the_command() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
