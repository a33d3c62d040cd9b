"""Reports written in processes of their own are those that are written here, whatever becomes of them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from divergence.reports import write_all
from divergence.reports.beside import Writers
from tests.reports import cases


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_reports_are_those_that_are_written_here(tmp_path: Path) -> None:
    given = [cases.fails(3), cases.passes(2), cases.CASES["nan"]]
    writers = Writers()
    for i, comparison in enumerate(given):
        writers.add(comparison, tmp_path / f"beside-{i}")
        write_all(comparison, tmp_path / f"here-{i}")
    writers.finish()
    assert writers.close() == {tmp_path / f"beside-{i}" for i in range(3)}
    for i in range(3):
        assert contents(tmp_path / f"beside-{i}") == contents(tmp_path / f"here-{i}")


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    writers = Writers()
    writers.add(cases.passes(1), tmp_path / "taken")
    with pytest.raises(OSError, match="taken"):
        writers.finish()
    assert writers.close() == set()


def test_more_than_can_wait_are_all_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("divergence.reports.beside._MOST", 1)
    writers = Writers()
    folders = [tmp_path / str(i) for i in range(5)]
    for folder in folders:
        writers.add(cases.passes(1), folder)
    assert sum((folder / "junit.xml").exists() for folder in folders) >= 2  # who adds too many waits
    writers.finish()
    assert all((folder / "plots").is_dir() for folder in folders)
    assert writers.close() == set(folders)


def test_a_process_that_is_killed_loses_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("divergence.reports.beside._MOST", 1)
    writers = Writers()
    writers.add(cases.passes(1), tmp_path / "0")
    assert writers._pool is not None
    for process in list(writers._pool._processes):
        os.kill(process, signal.SIGKILL)
    for i in (1, 2, 3):
        writers.add(cases.passes(1), tmp_path / str(i))
    writers.finish()
    assert writers.close() == {tmp_path / str(i) for i in range(4)}
    assert all((tmp_path / str(i) / "junit.xml").exists() for i in range(4))


def test_closing_leaves_out_what_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("divergence.reports.beside._MOST", 1)
    monkeypatch.setattr("divergence.reports.beside._WAITING", 5)
    writers = Writers()
    for i in range(5):
        writers.add(cases.passes(1), tmp_path / str(i))
    done = writers.close()
    assert len(done) < 5
    assert {folder for folder in tmp_path.iterdir() if (folder / "plots").is_dir()} == done


def test_nothing_to_write_starts_nothing() -> None:
    writers = Writers()
    writers.finish()
    assert writers.close() == set() and writers._pool is None
