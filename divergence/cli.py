"""The command line. Exit status: 0 pass, 1 fail, 2 error."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from divergence import __version__
from divergence.errors import DivergenceError, one_line

if TYPE_CHECKING:
    from divergence.config import Config, Tolerance
    from divergence.result import Comparison

F = TypeVar("F", bound=Callable[..., Any])
EXIT = {"pass": 0, "fail": 1, "error": 2}


class _Group(click.Group):
    """Turns every error into one line on stderr and exit status 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            status = super().main(*args, **kwargs)
        except click.ClickException as error:
            click.echo(f"error: {error.format_message()}", err=True)
            status = 2
        except DivergenceError as error:
            click.echo(f"error: {error}", err=True)
            status = 2
        except (KeyboardInterrupt, click.Abort):
            click.echo("error: interrupted; nothing was kept", err=True)
            status = 2
        except OSError as error:
            click.echo(f"error: {one_line(error)}", err=True)
            status = 2
        sys.exit(status if isinstance(status, int) else 0)


def _common(function: F) -> F:
    for option in reversed(
        (
            click.option("--inputs", metavar="FILE", help=".safetensors, .npz, FILE.py:FUNC or MODULE:FUNC."),
            click.option(
                "--detail", is_flag=True, help="Also query, attention, norms and MLP of every layer."
            ),
            click.option(
                "--memory",
                type=click.IntRange(1),
                default=512,
                show_default=True,
                metavar="MIB",
                help="Memory for an ONNX model's exposed tensors at a time.",
            ),
            click.option(
                "--config",
                "config_file",
                type=click.Path(path_type=Path),
                metavar="FILE",
                help="Configuration; by default divergence.toml or pyproject.toml here.",
            ),
        )
    ):
        function = option(function)
    return function


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="divergence")
def main() -> None:
    """Find the layer, the tensor and the cause where a transformer in ONNX or TensorRT departs from
    the one in PyTorch."""


@main.command()
@click.option(
    "--ref", required=True, metavar="SRC", help="Reference: pytorch, pytorch:FILE.py:FUNC, a capture."
)
@click.option("--cand", required=True, metavar="SRC", help="Candidate: an .onnx file, a capture, pytorch:...")
@_common
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder for report.json.")
@click.option("--precision", metavar="P", help="What the candidate runs in, where it does not show it.")
@click.option(
    "--tolerance",
    multiple=True,
    metavar="T",
    help="ratio=4, layers.*.key:cosine=0.999, mse=1e-5; may be given several times.",
)
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Sites not to compare; several times.")
@click.option("--replay", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True)
@click.option("--floor", metavar="SRC", help="Take the noise floor from this source's run.")
@click.option("--keep-captures", is_flag=True, help="Keep both captures in --out.")
@click.option(
    "--repro",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write the first failing layer for replay.",
)
@click.option("--no-diagnosis", is_flag=True, help="Do not look for the cause of a failure.")
def compare(
    ref: str,
    cand: str,
    inputs: str | None,
    detail: bool,
    memory: int,
    config_file: Path | None,
    out: Path | None,
    precision: str | None,
    tolerance: tuple[str, ...],
    exclude: tuple[str, ...],
    replay: Any,
    floor: str | None,
    keep_captures: bool,
    repro: Path | None,
    no_diagnosis: bool,
) -> int:
    """Compare a candidate with a reference and give a verdict."""
    if keep_captures and out is None:
        raise click.UsageError("--keep-captures needs --out DIR to keep them in")
    config = _config(config_file)
    from divergence.pipeline import compare as run
    from divergence.reports.progress import progress

    with progress(sys.stderr, sys.stderr.isatty()) as shown:
        result = run(
            ref,
            cand,
            inputs,
            precision=precision,
            tolerance=_tolerance(tolerance, config),
            exclude=exclude,
            detail=detail,
            replay=replay,
            floor=floor,
            memory=memory << 20,
            keep=out if keep_captures else None,
            config=config,
            command=_command(),
            diagnose=not no_diagnosis,
            repro=repro,
            progress=shown,
        )
    return _report(result, out)


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
def explain(folder: Path) -> int:
    """Show how the causes in the report in DIR were found: every one tried, with its evidence."""
    from divergence.reports.explain import render_explanation
    from divergence.result import load_comparison

    result = load_comparison(folder)
    width = click.get_current_context().terminal_width or 100
    click.echo(render_explanation(result, width=width, color=sys.stdout.isatty()))
    return 0


@main.command()
@click.argument("source", metavar="SRC")
@_common
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Capture to make.")
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    metavar="CAPTURE",
    help="Capture of the reference, which helps to find the sites of an ONNX model.",
)
def capture(
    source: str,
    inputs: str | None,
    detail: bool,
    memory: int,
    config_file: Path | None,
    out: Path,
    reference: Path | None,
) -> int:
    """Run SRC and record its sites, to compare elsewhere or later."""
    config = _config(config_file)
    from divergence.captures import open_capture
    from divergence.pipeline import capture as run
    from divergence.reports.progress import progress

    with progress(sys.stderr, sys.stderr.isatty()) as shown:
        taken = run(
            source,
            inputs,
            out,
            detail=detail,
            reference=open_capture(reference) if reference else None,
            memory=memory << 20,
            config=config,
            progress=shown,
        )
    click.echo(f"{out}: {len(taken.sites)} sites of {taken.facts.source}")
    return 0


@main.command()
@click.argument("source", metavar="SRC")
@_common
def inspect(source: str, inputs: str | None, detail: bool, memory: int, config_file: Path | None) -> int:  # noqa: ARG001 - shares the options of capture
    """Show what sites SRC has, how they were found, and the precision of each operator."""
    config = _config(config_file)
    from divergence.inputs import load_inputs
    from divergence.reports.terminal import render_description
    from divergence.sources import open_source

    probe = open_source(source, config, memory=memory << 20)
    spec = inputs or config.inputs
    click.echo(render_description(probe.describe(load_inputs(spec, config.base) if spec else None)))
    return 0


@main.command()
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the two reports.")
def demo(out: Path | None) -> int:
    """Run the main job on the bundled model: a clean ONNX export, and one with a planted fault."""
    from divergence.demo.run import run

    return run(out)


def _config(path: Path | None) -> Config:
    from divergence.config import load_config

    return load_config(path)


def _tolerance(given: tuple[str, ...], config: Config) -> Tolerance:
    from divergence.config import parse_tolerance

    tolerance = config.tolerance
    for text in given:
        tolerance = parse_tolerance(text, tolerance)
    return tolerance


def _report(result: Comparison, out: Path | None) -> int:
    from divergence.reports.terminal import render

    if out is not None:
        result.save(out / "report.json")
    terminal = sys.stdout.isatty()
    width = click.get_current_context().terminal_width or 100
    click.echo(render(result, width=width, color=terminal))
    if out is not None:
        click.echo(f"report: {out / 'report.json'}")
    return EXIT[result.verdict]


def _command() -> str:
    return shlex.join(["divergence", *sys.argv[1:]])
