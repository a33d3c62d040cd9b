"""How a command ends: an error is one line and the status 2, whatever it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import click
import pytest
from click.testing import CliRunner, Result

from divergence.config import load_config
from divergence.ending import Group


def ended(work: Callable[[], object], **environment: str) -> Result:
    """What comes of a command that does `work`."""
    group = Group(commands=[click.Command("work", callback=work)])
    return CliRunner().invoke(group, ["work"], env=environment)


def raised(error: BaseException) -> Callable[[], NoReturn]:
    def work() -> NoReturn:
        raise error

    return work


@pytest.mark.parametrize(
    "error", [ValueError("odd"), EOFError(), MemoryError(), SystemExit(0), SystemExit(1)]
)
def test_what_nobody_expects_is_one_line_and_never_a_verdict(error: BaseException) -> None:
    done = ended(raised(error))
    assert done.exit_code == 2
    line = done.stderr.strip()
    assert line.startswith(f"error: unexpected {type(error).__name__}") and "\n" not in line
    assert "set DIVERGENCE_TRACEBACK=1 to see the traceback" in line and "Traceback" not in line


def test_where_it_arose_is_the_innermost_place_in_divergence() -> None:
    done = ended(lambda: load_config(3))  # type: ignore[arg-type]
    assert "at divergence.config, line " in done.stderr


def test_a_traceback_is_shown_where_it_is_asked_for() -> None:
    done = ended(raised(ValueError("odd")), DIVERGENCE_TRACEBACK="1")
    assert done.exit_code == 2
    assert done.stderr.startswith("Traceback") and done.stderr.splitlines()[-1].startswith(
        "error: unexpected"
    )


def test_a_pipe_that_nobody_reads_is_no_verdict() -> None:
    done = ended(raised(BrokenPipeError(32, "Broken pipe")))
    assert done.exit_code == 2
    assert "standard output was closed" in done.stderr


def test_what_completes_a_command_for_a_shell_ends_well() -> None:
    done = CliRunner().invoke(Group("main"), [], prog_name="main", env={"_MAIN_COMPLETE": "bash_source"})
    assert done.exit_code == 0
    assert "_MAIN_COMPLETE" in done.stdout


@pytest.mark.parametrize("status", [0, 1, 2])
def test_the_status_of_a_command_is_what_it_returns(status: int) -> None:
    assert ended(lambda: status).exit_code == status
