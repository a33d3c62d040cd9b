"""An interrupt is not lost, wherever in Python's machinery it is raised."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
import weakref
from collections.abc import Callable
from types import FrameType

import pytest

from divergence.interrupts import Terminated, kept, remembered, terminable


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def when_it_goes() -> None:
    """Interrupted while an object is deleted, where Python drops what is raised."""

    class Thing:
        pass

    thing = Thing()
    weakref.finalize(thing, interrupt)
    del thing
    gc.collect()


def suppressed() -> None:
    with contextlib.suppress(KeyboardInterrupt):
        interrupt()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("somewhere", [when_it_goes, suppressed])
def test_a_dropped_interrupt_is_raised_at_the_next_step(
    somewhere: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt), remembered() as raise_if_interrupted:
        raise_if_interrupted()
        somewhere()
        raise_if_interrupted()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_dropped_sigterm_is_raised_at_the_next_step() -> None:
    with pytest.raises(Terminated), terminable(), remembered() as raise_if_interrupted:
        with contextlib.suppress(Terminated):
            signal.raise_signal(signal.SIGTERM)
        raise_if_interrupted()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_sigterm_that_the_program_handles_is_left_alone() -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
    try:
        with terminable(), remembered() as raise_if_interrupted:
            signal.raise_signal(signal.SIGTERM)
            raise_if_interrupted()
        assert got == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_library_that_handles_a_sigterm_itself_takes_it_from_nobody() -> None:
    with terminable():
        with kept():
            signal.signal(signal.SIGTERM, lambda *_: None)
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_interrupt_is_raised_where_it_comes() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), remembered():
        interrupt()
        done.append(1)
    assert not done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_program_is_left_alone() -> None:
    got = []

    def handler(number: int, frame: FrameType | None) -> None:
        got.append(number)

    before = signal.signal(signal.SIGINT, handler)
    try:
        with remembered() as raise_if_interrupted:
            interrupt()
            raise_if_interrupted()
        assert got == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_than_the_main_one_has_none() -> None:
    done = []

    def work() -> None:
        with remembered() as raise_if_interrupted:
            raise_if_interrupted()
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
