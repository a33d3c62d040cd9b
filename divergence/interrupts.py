"""Interrupts that are not lost: where Python calls back, as when something that is weakly referred to goes,
what is raised is reported and dropped, and the KeyboardInterrupt of a Ctrl-C with it. And the SIGTERM of who
cancels a job, which ends a command as a Ctrl-C does."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import NoReturn

Handler = Callable[[int, FrameType | None], object]


class Terminated(KeyboardInterrupt):
    """A SIGTERM, raised as a Ctrl-C is, so that whoever tidies up after one does so."""


def _terminated(_number: int, _frame: FrameType | None) -> NoReturn:
    raise Terminated


_RAISING: Mapping[int, Handler] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: _terminated,
}
"""What raises by signal."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raises `Terminated` on a SIGTERM, unless the program has a handler of its own."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Restores what handles a SIGTERM, if the program has said what does: libraries that are loaded or begun
    within put their own handler there."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def remembered() -> Iterator[Callable[[], None]]:
    """Gives a function that raises KeyboardInterrupt if there was one since, for long work to call
    between its steps.

    Interrupts are raised as ever; handlers that the program has set itself, and other threads than the
    main one, which get none, are left alone.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        _RAISING[number](number, frame)

    def check() -> None:
        if came:
            _RAISING[came[0]](came[0], None)

    main = threading.current_thread() is threading.main_thread()
    ours = [n for n, raising in _RAISING.items() if main and signal.getsignal(n) is raising]
    for number in ours:
        signal.signal(number, note)
    try:
        yield check
    finally:
        for number in ours:
            signal.signal(number, _RAISING[number])
