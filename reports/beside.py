"""Reports written in processes of their own, beside other work.

They load what draws while models run, and write the reports of a pair while the next one is compared: a
second or so of one core for each, whatever the size of the models. With many workers on other machines
nothing else would decide how long many pairs take.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING

from divergence.reports import Part, parts_of
from divergence.working import cores

if TYPE_CHECKING:
    from divergence.chain_result import Chain
    from divergence.result import Comparison

_MOST = 8
_WAITING = 4
"""Parts of reports that are under way or wait, for each process; who adds another one waits."""


class Writers:
    """Processes that write reports; they start when they are needed.

    Args:
        several: whether there will be reports of many, which are worth a process for every core, eight at
            most; for those of one comparison a single process is, which loads longer than it writes.
    """

    def __init__(self, *, several: bool = True) -> None:
        self._processes = min(_MOST, cores()) if several else 1
        self._pool: ProcessPoolExecutor | None = None
        self._loading: Future[None] | None = None
        self._under_way: dict[Future[object], tuple[Part, Path]] = {}
        self._left: Counter[Path] = Counter()

    def get_ready(self) -> None:
        """Starts one of them."""
        self._loading = self._started().submit(_load)

    def add(self, result: Comparison | Chain, folder: Path, *, link: str = "") -> None:
        """Has the reports of `result` written into `folder`; arguments as of `divergence.reports.write_all`.

        Raises:
            OSError: those of an earlier one could not be written.
        """
        parts = parts_of(result, folder, link=link)
        self._left[folder] += len(parts)
        for part in parts:
            self._collect()
            while len(self._under_way) >= _WAITING * self._processes:
                wait(self._under_way, return_when=FIRST_COMPLETED)
                self._collect()
            try:
                self._under_way[self._started().submit(part)] = part, folder
            except BrokenProcessPool:
                self._write_here(part, folder)

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
            if self._loading is not None and not self._loading.done() and not self._under_way:
                for process in self._pool._processes.values():  # noqa: SLF001 - public from Python 3.14 on
                    process.terminate()
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        for future, (_, folder) in self._under_way.items():
            self._left[folder] -= not future.cancelled() and future.exception() is None
        self._under_way = {}
        return {folder for folder, left in self._left.items() if not left}

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # A fork would take along the threads and devices of this process.
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._processes, spawn, _leave_interrupts_to_the_command)
        return self._pool

    def _collect(self) -> None:
        for future in [future for future in self._under_way if future.done()]:
            part, folder = self._under_way.pop(future)
            try:
                future.result()
            except BrokenProcessPool:
                self._write_here(part, folder)
            else:
                self._left[folder] -= 1

    def _write_here(self, part: Part, folder: Path) -> None:
        """Where a process was killed, as for want of memory; what comes next has new ones."""
        self._pool = None
        part()
        self._left[folder] -= 1


def _load() -> None:
    import divergence.reports.html
    import divergence.reports.plots  # noqa: F401


def _leave_interrupts_to_the_command() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
