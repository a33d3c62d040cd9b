"""The commands that read reports, and what all commands do with a result."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from divergence.errors import ConfigurationError, DivergenceError, SourceError, counted, one_line
from divergence.working import check_writable, cores

if TYPE_CHECKING:
    from divergence.chain_result import Chain
    from divergence.pairs_result import PairResult, Pairs
    from divergence.reports.beside import Writers
    from divergence.result import Comparison

_NARROWEST, _WIDEST = 60, 100

EXIT = {"pass": 0, "fail": 1, "error": 2}
"""Exit status by verdict."""


@click.command()
@click.argument("report_dir", metavar="DIR")
@click.option("--link", default="", metavar="URL", help="Where the page will be found, for summary.md.")
def report(report_dir: str, link: str) -> int:
    """Render the reports in DIR again from its report.json; exit status as of compare."""
    from divergence.chain_result import load_any

    with _sound(report_dir):
        result = load_any(report_dir)
        with reports_into(report_dir, link) as reports:
            reports.write(result)
            reports.show(result)
        return reports.finish(result)


@click.command()
@click.argument("old")
@click.argument("new")
@click.option(
    "--factor",
    type=float,
    default=2.0,
    show_default=True,
    help="Ratio of error-over-floor ratios up to which a change is noise.",
)
def diff(old: str, new: str, factor: float) -> int:
    """Compare two reports (folders or report.json): exit 1 if a site became worse beyond noise."""
    from divergence.diff import diff as run
    from divergence.reports.difference import render_difference
    from divergence.result import load_report

    reports = load_report(old), load_report(new)
    with _sound(old, new):
        found = run(*reports, factor)
        click.echo(render_difference(found, width=shown_width(), color=sys.stdout.isatty()))
    return {"regressed": 1, "error": 2}.get(found.verdict, 0)


@contextlib.contextmanager
def _sound(*paths: str) -> Iterator[None]:
    """What a report that was tampered with makes of a renderer becomes one line."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        where = " or ".join(paths)
        raise SourceError(
            f"{where}: the report holds what compare never writes ({one_line(error)}); run compare again"
        ) from error


class Reports:
    """Writes reports into `folder`, if there is one, and says where they are.

    Args:
        folder: on the disk.
        out: what the user calls it: the folder, or the URL that it will be uploaded to.
        link: where the page will be found, for `summary.md`.

    """

    def __init__(self, folder: Path | None, out: str, link: str = "") -> None:
        self.folder = folder
        self._out = out
        self._link = link
        self._pages: list[str] = []
        self._writers: Writers | None = None
        self._added: set[str] = set()
        self._failed: OSError | None = None

    def get_ready(self, *, several: bool) -> None:
        """Loads what draws, in a process beside this one, if there is a core for it.

        Args:
            several: whether there will be reports of many pairs.
        """
        # A process that has drawn before, as of a test session, draws again at once.
        if self.folder is not None and "matplotlib" not in sys.modules and cores() > 1:
            self._started(several=several).get_ready()

    def add(self, pair: PairResult) -> None:
        """Has the reports of a pair written; what is over all pairs is written in the end.

        That one cannot be written is said then: it costs no pair its verdict.
        """
        if self.folder is not None and self._failed is None:
            self._added.add(pair.folder)
            try:
                self._started().add(pair.comparison, self.folder / pair.folder)
            except OSError as error:
                self._failed = error

    def close(self) -> int:
        """Stops writing. Returns how many pairs have all their reports."""
        return len(self._writers.close()) if self._writers is not None else 0

    def _started(self, *, several: bool = True) -> Writers:
        if self._writers is None:
            from divergence.reports.beside import Writers

            self._writers = Writers(several=several)
        return self._writers

    def show(self, result: Comparison | Chain | Pairs) -> None:
        """Prints the terminal's report."""
        from divergence.reports.chain import render_chain
        from divergence.reports.pairs import render_pairs
        from divergence.reports.terminal import render
        from divergence.result import Comparison

        shape: Any = {"width": shown_width(), "color": sys.stdout.isatty()}
        if isinstance(result, Comparison):
            click.echo(render(result, **shape))
        elif result.kind == "chain":
            click.echo(render_chain(result, **shape))
        else:
            click.echo(render_pairs(result, **shape))

    def write(self, result: Comparison | Chain | Pairs) -> None:
        """Writes all reports that are not yet written.

        Raises:
            DivergenceError: some of them cannot be written.
        """
        if self.folder is None:
            return
        try:
            pages = self._write(result)
            if self._failed is not None:
                raise self._failed
        except OSError as error:
            raise DivergenceError(
                f"{self._out}: not all reports could be written ({one_line(error)}); make room there, or "
                "name another folder"
            ) from error
        self._pages = [page.relative_to(self.folder).as_posix() for page in pages]

    def _write(self, result: Comparison | Chain | Pairs) -> list[Path]:
        from divergence.reports import pages_of, write_all, write_over_pairs
        from divergence.result import Comparison

        assert self.folder is not None
        if isinstance(result, Comparison) or result.kind == "chain":
            if self._writers is None:
                return write_all(result, self.folder, link=self._link)
            self._writers.add(result, self.folder, link=self._link)
            self._writers.finish()
            return pages_of(result, self.folder)
        for pair in result.pairs:
            if pair.folder not in self._added:  # as where reports are rendered again
                self.add(pair)
        self._started().finish()
        return write_over_pairs(result, self.folder, link=self._link)

    def finish(self, result: Comparison | Chain | Pairs) -> int:
        """Says where the pages are, now that they are there, and gives the exit status."""
        for page in self._pages:
            click.echo(f"report: {self._out.rstrip('/')}/{page}")
        return EXIT[result.verdict]


@contextlib.contextmanager
def reports_into(out: str | None, link: str = "") -> Iterator[Reports]:
    """What writes the reports of a command into the folder or URL `out`.

    Raises:
        ConfigurationError: nothing can be written into the folder.
        StorageError: the URL cannot be written.
    """
    if out is None:
        yield Reports(None, "")
        return
    if not out.strip():
        raise ConfigurationError("--out is empty, as of a variable that is not set; name a folder or its URL")
    if "://" not in out:
        check_writable(Path(out))
        reports = Reports(Path(out), str(Path(out)), link)
        try:
            yield reports
        except KeyboardInterrupt as interrupt:
            written = reports.close()
            if not written:
                raise
            done = f"the reports of {counted(written, 'pair')} are in {out}, without an index"
            raise type(interrupt)(done) from None
        finally:
            reports.close()
        return
    from divergence.storage import writing

    with writing(out) as folder, contextlib.closing(Reports(folder, out, link)) as reports:
        yield reports


def shown_width() -> int:
    """Columns that are printed: those of a terminal, or of COLUMNS, as far as tables are drawn for them."""
    return min(max(shutil.get_terminal_size((_WIDEST, 0)).columns, _NARROWEST), _WIDEST)
