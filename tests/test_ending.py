"""How a command ends: an error is one line and the status 2, whatever it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import click
import pytest
from click.testing import CliRunner, Result

from divergence.config import load_config
from divergence.ending import Group
from tests.reports import cases

ROOT = Path(__file__).parents[1]


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


def test_a_sigterm_ends_a_command_as_an_interrupt_does() -> None:
    done = ended(lambda: signal.raise_signal(signal.SIGTERM))
    assert done.exit_code == 143
    assert done.stderr.splitlines()[-1] == "error: ended by SIGTERM; nothing was kept"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


SLOW = """
import pathlib, time
from divergence import demo
from divergence.demo import inputs

def load():
    model = demo.load()

    class Slow(type(model)):
        def forward(self, input_ids, attention_mask=None):
            found = super().forward(input_ids, attention_mask)
            pathlib.Path("running").touch()
            time.sleep(60)
            return found

    model.__class__ = Slow
    return model
"""


@pytest.mark.parametrize("command", ["capture", "compare"])
def test_a_sigterm_leaves_nothing_behind(command: str, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "temporary").mkdir()
    sources = {
        "capture": ["pytorch:slow.py:load", "--out", "run.capture"],
        "compare": ["--ref", "pytorch:slow.py:load", "--cand", "pytorch:slow.py:load"],
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "divergence", command, *sources[command], "--inputs", "slow.py:inputs"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary")},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "running").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=50)
    assert process.returncode == 143, err
    assert err.splitlines()[-1] == "error: ended by SIGTERM; nothing was kept"
    assert not [p for p in (tmp_path / "temporary").iterdir() if p.name.startswith("divergence")]
    assert not list(tmp_path.glob("run.capture*"))


def test_a_closed_standard_output_costs_no_verdict(tmp_path: Path) -> None:
    cases.passes().save(tmp_path / "report.json")
    command = [sys.executable, "-m", "divergence", "report", str(tmp_path)]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], cwd=ROOT, check=False, timeout=120
    )
    assert done.returncode == 0
