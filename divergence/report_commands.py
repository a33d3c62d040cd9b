"""The commands that read reports, and what all commands do with a result."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from divergence.errors import SourceError, one_line

if TYPE_CHECKING:
    from divergence.chain_result import Chain
    from divergence.result import Comparison

EXIT = {"pass": 0, "fail": 1, "error": 2}
"""Exit status by verdict."""


@click.command()
@click.argument("report_dir", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--link", default="", metavar="URL", help="Where the page will be found, for summary.md.")
def report(report_dir: Path, link: str) -> int:
    """Render the reports in DIR again from its report.json; exit status as of compare."""
    from divergence.chain_result import load_any

    with _sound(report_dir):
        return show(load_any(report_dir), report_dir, link)


@click.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
@click.option(
    "--factor",
    type=float,
    default=2.0,
    show_default=True,
    help="Ratio of error-over-floor ratios up to which a change is noise.",
)
def diff(old: Path, new: Path, factor: float) -> int:
    """Compare two reports (folders or report.json): exit 1 if a site became worse beyond noise."""
    from divergence.diff import diff as run
    from divergence.reports.difference import render_difference
    from divergence.result import load_report

    reports = load_report(old), load_report(new)
    with _sound(old, new):
        found = run(*reports, factor)
        click.echo(render_difference(found, width=_width(), color=sys.stdout.isatty()))
    return {"regressed": 1, "error": 2}.get(found.verdict, 0)


@contextmanager
def _sound(*paths: Path) -> Iterator[None]:
    """What a report that was tampered with makes of a renderer becomes one line."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        where = " or ".join(str(path) for path in paths)
        raise SourceError(
            f"{where}: the report holds what compare never writes ({one_line(error)}); run compare again"
        ) from error


def show(result: Comparison | Chain, out: Path | None, link: str = "") -> int:
    """Writes the reports into `out`, if given, prints the terminal's, and gives the exit status."""
    from divergence.reports.chain import render_chain
    from divergence.reports.terminal import render
    from divergence.result import Comparison

    pages: list[Path] = []
    if out is not None:
        from divergence.reports import write_all

        pages = write_all(result, out, link=link)
    color = sys.stdout.isatty()
    if isinstance(result, Comparison):
        click.echo(render(result, width=_width(), color=color))
    else:
        click.echo(render_chain(result, width=_width(), color=color))
    for page in pages:
        click.echo(f"report: {page}")
    return EXIT[result.verdict]


def _width() -> int:
    return click.get_current_context().terminal_width or 100
