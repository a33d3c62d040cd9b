"""Options that commands share, and the many of `compare`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def _all(*options: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator that adds `options` in their order."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def as_folder(_context: click.Context, _option: click.Parameter, given: str | None) -> Path | None:
    """The folder that an option names. An empty text would be the current one.

    Raises:
        click.BadParameter: it is empty.
    """
    if given is not None and not given.strip():
        raise click.BadParameter("it is empty, as of a variable that is not set; name a folder")
    return None if given is None else Path(given)


_SAMPLE = ".safetensors, .npz, FILE.py:FUNC or MODULE:FUNC; a file's URL too."

sample = _all(click.option("--inputs", metavar="FILE", help=_SAMPLE))
"""`--inputs` of a command that runs one sample."""

common = _all(
    click.option("--detail", is_flag=True, help="Also query, attention, norms and MLP of every layer."),
    click.option(
        "--memory",
        type=click.IntRange(1),
        default=512,
        show_default=True,
        metavar="MIB",
        help="Host memory for tensors; what does not fit goes to disk.",
    ),
    click.option(
        "--config",
        "config_file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Configuration; by default divergence.toml or pyproject.toml here.",
    ),
)
"""Options of all commands that open a source."""

engine = _all(
    click.option(
        "--host",
        default="torch",
        show_default=True,
        metavar="HOST",
        help="How engines are run: torch, pycuda, both (compared bit by bit), FILE.py:CLASS.",
    ),
    click.option(
        "--context",
        type=click.Choice(["primary", "own"]),
        default="primary",
        show_default=True,
        help="CUDA context of the pycuda host.",
    ),
    click.option(
        "--plugin", multiple=True, metavar="LIB", help="Plugin library to load first; several times."
    ),
    click.option(
        "--profile",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Optimization profile of the engine to run in.",
    ),
    click.option("--hazards", is_flag=True, help="Look for what the host forgets to wait for."),
)
"""How engines are run."""

comparison = _all(
    click.option(
        "--ref", required=True, metavar="SRC", help="Reference: pytorch, pytorch:FILE.py:FUNC, a capture."
    ),
    click.option(
        "--cand",
        required=True,
        multiple=True,
        metavar="SRC",
        help="Candidate: an .onnx file, a capture or its URL, pytorch:... Several make a chain: each is "
        "also compared with the one before it.",
    ),
    click.option(
        "--inputs",
        multiple=True,
        metavar="FILE",
        help=f"{_SAMPLE} Several: every candidate is compared on every sample.",
    ),
    click.option("--out", metavar="DIR", help="Folder for the reports, or its URL."),
    click.option("--precision", metavar="P", help="What the candidate runs in, where it does not show it."),
    click.option(
        "--tolerance",
        multiple=True,
        metavar="T",
        help="ratio=4, layers.*.key:cosine=0.999, mse=1e-5; may be given several times.",
    ),
    click.option("--exclude", multiple=True, metavar="PATTERN", help="Sites not to compare; several times."),
    click.option(
        "--replay", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True
    ),
    click.option("--floor", metavar="SRC", help="Take the noise floor from this source's run."),
    click.option(
        "--ray",
        metavar="ADDRESS",
        help="Compare pairs as tasks on a Ray cluster: its address, or local (local:2 for two workers).",
    ),
    click.option(
        "--ray-gpus",
        type=click.FloatRange(0),
        metavar="N",
        help="GPUs that a task asks for; by default 1 for engines and CUDA providers, if there are any.",
    ),
    click.option("--keep-captures", is_flag=True, help="Keep all captures in --out."),
    click.option(
        "--repro",
        callback=as_folder,
        metavar="DIR",
        help="Write the first failing layer for replay.",
    ),
    click.option("--no-diagnosis", is_flag=True, help="Do not look for the cause of a failure."),
)
"""Options of `compare`."""
