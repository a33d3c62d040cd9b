"""The pytest plugin: the fixture and marker `divergence`, and `--divergence-report DIR`.

pytest loads it for every suite of an environment, so that it imports nothing at load but pytest and
what is as light as `divergence.session`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from divergence import session
from divergence.errors import one_line

if TYPE_CHECKING:
    from divergence.result import Comparison

_OPTION = "--divergence-report"
_KEY = pytest.StashKey["_Running"]()


class _Running:
    """What the plugin keeps of a session of pytest.

    Attributes:
        session: as the comparisons see it.
        logs: folder of the lines that all processes of the session write, or None without a report.
        entries: of the index, once it is written.
    """

    def __init__(self, running: session.Session, logs: Path | None) -> None:
        self.session = running
        self.logs = logs
        self.entries: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--divergence-report`."""
    parser.getgroup("divergence").addoption(
        _OPTION,
        metavar="DIR",
        help="Folder for the reports of all comparisons of divergence, with an index page.",
    )


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Begins the session: in a worker of xdist the controller says where its reports go."""
    config.addinivalue_line(
        "markers",
        "divergence(*tolerances, **options): tolerances ('layers.*.key:cosine=0.999', {'layers.*.key': "
        "{'cosine': 0.999}}) and options (precision, exclude, detail, ...) of the comparisons of a test",
    )
    given = config.getoption(_OPTION)
    report = logs = None
    name = "main"
    if (worker := getattr(config, "workerinput", None)) is not None:
        name = str(worker["workerid"])
        if "divergence_logs" in worker:
            report, logs = Path(worker["divergence_report"]), Path(worker["divergence_logs"])
    elif given and not config.option.collectonly:
        report = Path(given).absolute()
        logs = _make_folders(report)
    running = session.Session(config.rootpath, report, logs and logs / f"{name}.jsonl")
    config.stash[_KEY] = _Running(running, logs)
    session.begin(running)


def _make_folders(report: Path) -> Path:
    try:
        report.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".session-", dir=report))
    except OSError as error:
        raise pytest.UsageError(f"{_OPTION} {report}: cannot be made ({one_line(error)})") from error


def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends the session."""
    running = config.stash.get(_KEY, None)
    if running is not None:
        session.end(running.session)
        del config.stash[_KEY]


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tells a worker of xdist where its reports go."""
    running = node.config.stash[_KEY]
    if running.logs is not None:
        node.workerinput["divergence_report"] = str(running.session.report)
        node.workerinput["divergence_logs"] = str(running.logs)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Tells the session which test runs, and its markers."""
    running = item.config.stash[_KEY].session
    running.test = item.nodeid
    marks = [(mark.args, mark.kwargs) for mark in item.iter_markers("divergence")]
    running.marks = marks[::-1]
    try:
        return (yield)
    finally:
        running.test, running.marks = "", ()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Merges what all processes wrote into the index."""
    running = session.config.stash.get(_KEY, None)
    if running is None or running.logs is None or hasattr(session.config, "workerinput"):
        return
    from divergence.reports.index import write_index

    running.entries = _entries(running.logs)
    assert running.session.report is not None
    try:
        write_index(running.entries, running.session.report)
    except OSError as error:
        raise pytest.UsageError(f"{_OPTION}: no index was written ({one_line(error)})") from error
    shutil.rmtree(running.logs, ignore_errors=True)


def _entries(logs: Path) -> list[dict[str, Any]]:
    """The lines of all processes; a last line without its end is of a worker that was killed in it."""
    lines = [
        line
        for log in sorted(logs.glob("*.jsonl"))
        for line in log.read_text(encoding="utf-8").splitlines(keepends=True)
    ]
    return [json.loads(line) for line in lines if line.endswith("\n")]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Says how many comparisons there were, and where the index is."""
    running = config.stash.get(_KEY, None)
    if running is None or running.session.report is None:
        return
    from divergence.reports.index import counts

    found = counts(running.entries)
    said = ", ".join(f"{number} {verdict}" for verdict, number in found.items() if number)
    terminalreporter.section("divergence")
    terminalreporter.write_line(
        f"{len(running.entries)} comparisons{f': {said}' if said else ''}; "
        f"index: {running.session.report / 'index.html'}"
    )


@pytest.fixture(name="divergence")
def _divergence() -> Callable[..., Comparison]:
    """`divergence.assert_close`: compares, and fails the test where the candidate fails."""
    from divergence.assertions import assert_close

    return assert_close
