from __future__ import annotations

import io
import sys

import pytest

from divergence.reports.progress import progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that stands still unless it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_short_stages_write_nothing_where_there_is_no_terminal() -> None:
    stream, clock = io.StringIO(), Clock()
    with progress(stream, False, clock=clock) as shown:
        for label in ("reference", "candidate"):
            for done in range(3):
                shown(label, done, 3)
                clock.now += 0.5
    assert stream.getvalue() == ""


@pytest.mark.parametrize("enabled", [False, True])
def test_a_long_stage_writes_one_line_where_there_is_no_terminal(enabled: bool) -> None:
    stream, clock = io.StringIO(), Clock()
    with progress(stream, enabled, clock=clock) as shown:
        for done in range(30):
            shown("replay", done, 30)
            clock.now += 1.0
    assert stream.getvalue() == "replay: 3 of 30\n"


def test_a_stage_of_unknown_length_is_under_way() -> None:
    stream, clock = io.StringIO(), Clock()
    with progress(stream, False, clock=clock) as shown:
        shown("build", 0, 0)
        clock.now += 5.0
        shown("build", 1, 0)
    assert stream.getvalue() == "build: under way\n"


def test_a_stage_that_was_silent_for_long_is_told_when_it_ends() -> None:
    stream, clock = io.StringIO(), Clock()
    with progress(stream, False, clock=clock) as shown:
        shown("export", 0, 1)
        clock.now += 7.0
        shown("candidate", 0, 1)
        clock.now += 3.0
    assert stream.getvalue() == "export: took 7 s\ncandidate: took 3 s\n"


def test_a_terminal_gets_a_bar_that_is_wiped(capsys: pytest.CaptureFixture[str]) -> None:
    stream = Terminal()
    with progress(stream, True) as shown:
        shown("reference", 1, 4)
        print("beside it")
        shown("candidate [red]x[/red]", 0, 0)
    assert "candidate [red]x[/red]" in stream.getvalue()
    # Rich ends a transient display by erasing its lines.
    assert "\x1b[2K" in stream.getvalue()
    assert capsys.readouterr().out == "beside it\n"
    assert "beside it" not in stream.getvalue()


def test_a_terminal_without_a_moving_display_gets_lines() -> None:
    stream = Terminal()
    with progress(stream, False) as shown:
        shown("reference", 1, 4)
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_an_error_passes_through(stream: io.StringIO) -> None:
    out, err = sys.stdout, sys.stderr
    with pytest.raises(ValueError, match="broken"), progress(stream, True) as shown:
        shown("reference", 1, 4)
        raise ValueError("broken")
    assert (sys.stdout, sys.stderr) == (out, err)
