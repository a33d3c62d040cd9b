"""How a command ends: what goes wrong is one line on stderr, and an exit status that no verdict has."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import traceback
from typing import Any, NoReturn

import click

from divergence.errors import DivergenceError, one_line
from divergence.interrupts import Terminated, terminable

TRACEBACK = "DIVERGENCE_TRACEBACK"
"""Environment variable: where it is 1, an error comes with its traceback."""


class Group(click.Group):
    """Turns every error into one line on stderr and exit status 2, and a SIGTERM to 143."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the command and ends it; arguments as of `click.Group.main`."""
        whole_process = not args and "args" not in kwargs
        kwargs["standalone_mode"] = False
        _open_streams()
        try:
            with terminable():
                found = super().main(*args, **kwargs)
            status = found if isinstance(found, int) else 0
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            if _left_by_click(error) not in {"", "main"}:
                raise
            status = _refused(error)
        _leave(status, whole_process=whole_process)


def _open_streams() -> None:
    """Opens what whoever started the process has closed: Python has None for it, and a file that is opened
    later would take its place and what libraries print."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the end


def _left_by_click(error: BaseException) -> str:
    """The function of click that ended the process: `main` where nobody reads what is written, another
    where a shell was told how to complete a command; "" where it was not click."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = isinstance(error, SystemExit) and frames[-1].f_globals.get("__name__") == "click.core"
    return frames[-1].f_code.co_name if own else ""


def _refused(error: BaseException) -> int:
    """Says what went wrong, and gives the exit status."""
    if isinstance(error, click.Abort) and error.__cause__ is not None:
        error = error.__cause__
    if os.environ.get(TRACEBACK) == "1":
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    click.echo(f"error: {_in_one_line(error)}", err=True)
    return 128 + signal.SIGTERM if isinstance(error, Terminated) else 2


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, DivergenceError):
        return str(error)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        how = "ended by SIGTERM" if isinstance(error, Terminated) else "interrupted"
        return f"{how}; {error if error.args else 'nothing was kept'}"
    if isinstance(error, OSError):
        return one_line(error)
    if _left_by_click(error):
        return "standard output was closed before all was written"
    frames = [(str(f.f_globals.get("__name__")), line) for f, line in traceback.walk_tb(error.__traceback__)]
    module, line = ([place for place in frames if place[0].startswith("divergence.")] or frames)[-1]
    return (
        f"unexpected {one_line(error)} at {module}, line {line}; set {TRACEBACK}=1 to see the traceback, and "
        "report it with that"
    )


def _leave(status: int, *, whole_process: bool) -> NoReturn:
    """Ends the command. A process that holds models on a GPU ends by itself, once all has been written: the
    system frees what they hold sooner than Python and the libraries do, which take a second or more."""
    torch = sys.modules.get("torch")
    if whole_process and torch is not None and torch.cuda.is_initialized() and "ray" not in sys.modules:
        atexit._run_exitfuncs()  # noqa: SLF001 - temporary folders, threads that still write
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # whoever read it has gone
                stream.flush()
        os._exit(status)
    sys.exit(status)
