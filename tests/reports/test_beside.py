"""Reports written in processes of their own are those that are written here, whatever becomes of them."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import divergence
from divergence import demo
from divergence.config import Config
from divergence.reports import parts_of, write_all
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
    # Four of ten parts may be under way or wait: who adds more waits.
    assert sum((folder / "junit.xml").exists() for folder in folders) >= 3
    writers.finish()
    assert all((folder / "plots").is_dir() for folder in folders)
    assert writers.close() == set(folders)


def test_a_process_that_is_killed_loses_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("divergence.reports.beside._MOST", 1)
    writers = Writers()
    writers.add(cases.passes(1), tmp_path / "0")
    assert writers._pool is not None
    for process in list(writers._pool._processes):  # before it could have imported anything
        os.kill(process, signal.SIGKILL)
    for i in (1, 2, 3):
        writers.add(cases.passes(1), tmp_path / str(i))
    writers.finish()
    assert writers.close() == {tmp_path / str(i) for i in range(4)}
    assert all((tmp_path / str(i) / "junit.xml").exists() for i in range(4))


def test_closing_leaves_out_what_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("divergence.reports.beside._MOST", 1)
    monkeypatch.setattr("divergence.reports.beside._WAITING", 10)
    writers = Writers()
    for i in range(5):
        writers.add(cases.passes(1), tmp_path / str(i))
    done = writers.close()
    assert len(done) < 5
    complete = {f for f in tmp_path.iterdir() if (f / "plots").is_dir() and (f / "junit.xml").exists()}
    assert complete == done


def test_nothing_to_write_starts_nothing() -> None:
    writers = Writers()
    writers.finish()
    assert writers.close() == set() and writers._pool is None


def test_what_got_ready_for_nothing_is_not_waited_for() -> None:
    writers = Writers(several=False)
    writers.get_ready()
    assert writers._pool is not None
    (process,) = writers._pool._processes.values()
    started = time.monotonic()
    assert writers.close() == set()
    assert not process.is_alive()
    assert time.monotonic() - started < 30  # loading ends in seconds at most, and it was cut off
    assert process.exitcode == -signal.SIGTERM


def test_reports_of_one_comparison_are_written_by_what_got_ready(tmp_path: Path) -> None:
    writers = Writers(several=False)
    writers.get_ready()
    writers.add(cases.fails(3), tmp_path / "beside", link="https://a.b/c")
    writers.finish()
    assert writers._pool is not None and len(writers._pool._processes) == 1
    assert writers.close() == {tmp_path / "beside"}
    write_all(cases.fails(3), tmp_path / "here", link="https://a.b/c")
    assert contents(tmp_path / "beside") == contents(tmp_path / "here")


def test_what_is_sent_needs_no_torch(tmp_path: Path) -> None:
    """Loading it would take longer than drawing."""
    result = divergence.compare(demo.load(), demo.load(), demo.inputs(tokens=8), config=Config())
    sent = tmp_path / "sent"
    sent.write_bytes(pickle.dumps(parts_of(result, Path("out"))))
    code = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb')); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, sent], check=True)
