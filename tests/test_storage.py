"""Captures, inputs and reports at addresses: what is uploaded, fetched and refused."""

from __future__ import annotations

import dataclasses
import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from fsspec.implementations.memory import MemoryFileSystem

import divergence
from divergence import storage
from divergence.captures import MANIFEST, Capture
from divergence.chain_result import load_any
from divergence.cli import main
from divergence.config import Config, load_config
from divergence.errors import CaptureError, InputError, SourceError, StorageError
from divergence.inputs import load_inputs
from divergence.probes import Observation, RunFacts
from divergence.recording import CaptureWriter
from divergence.sites import Site
from tests.models import inputs_for, llama
from tests.reports import cases


class BrokenFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """A file system in memory that fails when asked for the nth time."""

    protocol = "broken"
    store: dict[str, Any] = {}  # noqa: RUF012 (as in its base)
    pseudo_dirs = [""]  # noqa: RUF012 (as in its base)
    puts_left = gets_left = 10**6
    error: Exception = OSError("the network is gone")

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        type(self).puts_left -= 1
        if self.puts_left < 0:
            raise self.error
        super().put_file(lpath, rpath, **kwargs)

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        type(self).gets_left -= 1
        if self.gets_left < 0:
            raise self.error
        super().get_file(rpath, lpath, **kwargs)


@pytest.fixture(autouse=True)
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty stores, and temporary folders that a test can look at."""
    fsspec.register_implementation("broken", BrokenFileSystem, clobber=True)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for system in (MemoryFileSystem, BrokenFileSystem):
        monkeypatch.setattr(system, "store", {})
        monkeypatch.setattr(system, "pseudo_dirs", [""])
    monkeypatch.setattr(BrokenFileSystem, "puts_left", 10**6)
    monkeypatch.setattr(BrokenFileSystem, "gets_left", 10**6)
    monkeypatch.setattr(BrokenFileSystem, "error", OSError("the network is gone"))


class BucketsFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """A file system with one bucket, where making a folder would make a bucket."""

    protocol = "oss"

    def makedirs(self, path: str, exist_ok: bool = False) -> None:  # noqa: FBT002 (as in its base)
        raise AssertionError(f"made {path}")

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        if "mistyped" in rpath:
            raise FileNotFoundError("The specified bucket does not exist")
        with self.open(rpath, "wb") as file:
            file.write(Path(lpath).read_bytes())


def test_a_bucket_that_does_not_exist_is_not_made(tmp_path: Path) -> None:
    fsspec.register_implementation("oss", BucketsFileSystem, clobber=True)
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "report.json").write_text("{}")
    with pytest.raises(StorageError, match="oss://mistyped/run: no such file or folder; check the address"):
        storage._Store.at("oss://mistyped/run").upload(folder)
    storage._Store.at("oss://mine/run").upload(folder)
    assert storage._Store.at("oss://mine/run").sizes() == {"report.json": 2}


def left(tmp_path: Path) -> list[str]:
    """What divergence has left in the folder for temporary files."""
    gc.collect()
    return sorted(p.name for p in (tmp_path / "temporary").glob("divergence*"))


def held(protocol: str = "memory") -> list[str]:
    return sorted(fsspec.filesystem(protocol).find("/"))


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def in_shards(path: Path, layers: int = 3) -> Capture:
    """A capture with a shard for every layer."""
    with CaptureWriter(path, shard_bytes=1) as writer:
        for layer in range(layers):
            tensor = torch.full((1, 4, 8), float(layer))
            writer(Observation(Site(layer, "hidden"), tensor, ("batch", "token", "channel"), "test"))
        return writer.close(RunFacts("fake", "fake", "d", "fp32", ("",)), "digest")


def uploaded(tmp_path: Path, url: str = "memory://captures/run") -> str:
    with storage.writing(url) as folder:
        in_shards(folder)
    return url


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_a_capture_is_recorded_opened_and_compared_at_an_address(protocol: str, tmp_path: Path) -> None:
    url = "memory://bucket/run.capture" if protocol == "memory" else f"file://{tmp_path}/run.capture"
    here = divergence.capture(llama(), inputs_for("llama"), tmp_path / "here.capture", config=Config())
    there = divergence.capture(llama(), inputs_for("llama"), url, config=Config())
    assert there.sites == here.sites and there.inputs_digest == here.inputs_digest
    assert all(torch.equal(there.tensor(site), here.tensor(site)) for site in here.sites)
    result = divergence.compare(llama(), url, inputs_for("llama"), config=Config())
    assert result.verdict == "pass" and all(site.bit_equal for site in result.sites)
    assert (tmp_path / "run.capture").is_dir() == (protocol == "file")
    del there
    assert left(tmp_path) == []


def test_shards_are_fetched_when_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = uploaded(tmp_path, "broken://run")
    monkeypatch.setattr(BrokenFileSystem, "gets_left", 2)  # the manifest and one shard
    capture = divergence.open_capture(url)
    assert float(capture.tensor(Site(1, "hidden"))[0, 0, 0]) == 1
    assert float(capture.tensor(Site(1, "hidden"))[0, 0, 1]) == 1
    with pytest.raises(StorageError, match=r"shard-0002.*cannot be read \(OSError: the network is gone\)"):
        capture.tensor(Site(2, "hidden"))


def test_the_fetched_shards_are_bounded_and_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = uploaded(tmp_path)
    monkeypatch.setattr(storage, "CACHE_BYTES", 1)
    capture = divergence.open_capture(url)
    first = capture.tensor(Site(0, "hidden"))
    for layer in (1, 2, 0):
        assert float(capture.tensor(Site(layer, "hidden")).mean()) == layer
        assert len([p for p in capture.path.iterdir() if p.suffix == ".safetensors"]) <= 3
        assert len(capture.shards._held) == 1  # type: ignore[attr-defined]
    assert float(first.mean()) == 0  # what was evicted meanwhile is still what it was
    del capture, first
    assert left(tmp_path) == []


def test_a_copy_of_a_capture_outlives_it(tmp_path: Path) -> None:
    copied = dataclasses.replace(divergence.open_capture(uploaded(tmp_path)))
    gc.collect()
    assert float(copied.tensor(Site(2, "hidden")).mean()) == 2
    del copied
    assert left(tmp_path) == []


@pytest.mark.parametrize("puts", [0, 1, 2, 3])
def test_an_upload_that_breaks_off_is_no_capture(
    puts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded(tmp_path, "broken://run")  # an older one is there, whose manifest must not vouch for a mixture
    monkeypatch.setattr(BrokenFileSystem, "puts_left", puts)
    with pytest.raises(StorageError, match="the network is gone.*nothing is lost: it is kept in") as raised:
        uploaded(tmp_path, "broken://run")
    with pytest.raises(CaptureError, match="its upload was interrupted"):
        divergence.open_capture("broken://run")
    kept = Path(str(raised.value).rpartition(" ")[2])
    assert divergence.open_capture(kept).sites == tuple(Site(i, "hidden") for i in range(3))
    monkeypatch.setattr(BrokenFileSystem, "puts_left", 10**6)
    storage.recorded("broken://run", in_shards)
    assert len(divergence.open_capture("broken://run").sites) == 3


def test_a_capture_is_replaced_whole(tmp_path: Path) -> None:
    uploaded(tmp_path)
    with storage.writing("memory://captures/run") as folder:
        in_shards(folder, layers=1)
    assert held() == ["/captures/run/manifest.json", "/captures/run/shard-0000.safetensors"]
    assert divergence.open_capture("memory://captures/run").sites == (Site(0, "hidden"),)


def test_what_fails_within_uploads_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), storage.writing("memory://run") as folder:
        (folder / "report.json").write_text("{}")
        raise ZeroDivisionError
    assert held() == [] and left(tmp_path) == []


def damaged(change: str) -> None:
    system = fsspec.filesystem("memory")
    if change == "cut":
        system.pipe_file("/captures/run/shard-0001.safetensors", b"12345")
    elif change == "missing":
        system.rm_file("/captures/run/shard-0001.safetensors")
    elif change == "manifest":
        system.rm_file(f"/captures/run/{MANIFEST}")
    elif change == "text":
        system.pipe_file(f"/captures/run/{MANIFEST}", b"hello")
    elif change == "gone":
        system.rm("/captures", recursive=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("cut", "shard-0001.safetensors: 5 bytes instead of"),
        ("missing", "shard-0001.safetensors: missing instead of"),
        ("manifest", "its upload was interrupted"),
        ("text", "not a capture manifest"),
        ("gone", "no such capture"),
    ],
)
def test_a_damaged_capture_is_refused_by_its_address(change: str, message: str, tmp_path: Path) -> None:
    url = uploaded(tmp_path)
    damaged(change)
    with pytest.raises(CaptureError, match=message) as raised:
        divergence.open_capture(url)
    assert str(raised.value).startswith(url) and "temporary" not in str(raised.value)
    assert left(tmp_path) == []


def test_a_shard_that_changes_after_opening_is_refused(tmp_path: Path) -> None:
    capture = divergence.open_capture(uploaded(tmp_path))
    damaged("cut")
    with pytest.raises(CaptureError, match="cannot read"):
        capture.tensor(Site(1, "hidden"))


def test_something_else_is_not_overwritten_by_a_capture() -> None:
    fsspec.filesystem("memory").pipe_file("/papers/thesis.pdf", b"years of work")
    with pytest.raises(CaptureError, match="memory://papers: exists and is not a capture"):
        divergence.capture(llama(), inputs_for("llama"), "memory://papers", config=Config())
    assert held() == ["/papers/thesis.pdf"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s4://bucket/run", "fsspec knows no protocol 's4'; did you mean 's3'"),
        ("abfs://bucket/run", "abfs:// needs a library that is not installed; pip install adlfs"),
        ("memory://absent/run", "no such capture"),
        ("memory://absent/model.onnx", "only captures and inputs are read from a URL"),
    ],
)
def test_an_address_that_cannot_be_used_is_one_line(url: str, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.zeros(1))
    result = run("compare", "--ref", url, "--cand", url, "--inputs", tmp_path / "in.npz")
    assert result.exit_code == 2 and message in result.output
    assert len(result.output.splitlines()) == 1


def test_no_permission_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(BrokenFileSystem, "puts_left", 0)
    monkeypatch.setattr(BrokenFileSystem, "error", PermissionError("Access Denied"))
    cases.passes(1).save(tmp_path / "report.json")
    with pytest.raises(StorageError, match=r"may not be written .*Access Denied.*credentials that broken"):
        uploaded(tmp_path, "broken://run")


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_inputs_are_read_from_an_address(suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / f"in.{suffix}"
    given = inputs_for("llama")
    if suffix == "npz":
        np.savez(file, **{name: tensor.numpy() for name, tensor in given.items()})  # type: ignore[arg-type]
    else:
        save_file(given, file)
    fsspec.filesystem("memory").put_file(str(file), f"/data/in.{suffix}")
    for url in (f"memory://data/in.{suffix}", f"file://{file}"):
        read = load_inputs(url, Path("elsewhere"))
        assert all(torch.equal(read[name], given[name]) for name in given) and read.keys() == given.keys()
    assert left(tmp_path) == []


def test_inputs_that_cannot_be_read_are_told_by_their_address(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/data/in.npz", b"no archive")
    with pytest.raises(InputError, match=r"^memory://data/in.npz: cannot be read"):
        load_inputs("memory://data/in.npz", tmp_path)
    with pytest.raises(StorageError, match=r"^memory://data/absent.npz: no such file"):
        load_inputs("memory://data/absent.npz", tmp_path)
    with pytest.raises(InputError, match=r"in.pt: a .pt file is a pickle"):
        fsspec.filesystem("memory").pipe_file("/data/in.pt", b"")
        load_inputs("memory://data/in.pt", tmp_path)


def test_addresses_in_a_configuration_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "divergence.toml").write_text(
        'inputs = "s3://b/in.npz"\n[sources.ref]\npath = "s3://b/run.capture"\n'
    )
    config = load_config(start=tmp_path)
    assert config.inputs == "s3://b/in.npz" and config.sources["ref"].path == "s3://b/run.capture"


@pytest.mark.parametrize("base", ["memory://reports/1", "file"])
def test_reports_are_written_read_and_rendered_again_at_an_address(base: str, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/reports" if base == "file" else base
    with storage.writing(url) as folder:
        cases.fails(3).save(folder / "report.json")
    result = run("report", url)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].endswith("report.html")
    assert load_any(url) == divergence.Comparison.from_json(cases.fails(3).to_json())
    explained = run("explain", url)
    assert explained.exit_code == 0, explained.output
    assert run("diff", url, url).exit_code == 0
    if base != "file":
        names = {Path(path).name for path in held()}
        assert {"report.json", "report.html", "summary.md", "junit.xml"} <= names
        assert result.output.splitlines()[-1] == "report: memory://reports/1/report.html"
    assert left(tmp_path) == []


def test_a_report_that_is_not_there_is_one_line() -> None:
    result = run("report", "memory://nowhere")
    assert result.exit_code == 2
    assert result.output == "error: memory://nowhere/report.json: no such file or folder; check the address\n"


def test_reports_that_cannot_be_uploaded_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with storage.writing("broken://reports") as folder:
        cases.fails(3).save(folder / "report.json")
    monkeypatch.setattr(BrokenFileSystem, "puts_left", 3)
    result = run("report", "broken://reports")
    assert result.exit_code == 2
    assert "FAIL" in result.output  # the verdict is told all the same
    last = result.output.splitlines()[-1]
    kept = Path(last.rpartition(" ")[2])
    assert last.startswith("error: broken://reports: cannot be written") and (kept / "report.html").is_file()
    assert "/reports/report.json" not in held("broken")  # the mark of a whole report


def test_report_json_is_uploaded_last_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    put: list[str] = []
    original = MemoryFileSystem.put_file

    def noting(self: MemoryFileSystem, lpath: str, rpath: str, **kwargs: Any) -> None:
        put.append(rpath)
        original(self, lpath, rpath, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "put_file", noting)
    with storage.writing("memory://all") as folder:
        for name in ("index.json", "manifest.json", "report.json", "a", "z", "index.html", "sub/report.json"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("x")
    assert [path.removeprefix("/all/") for path in put] == [
        "a",
        "z",
        "manifest.json",
        "report.json",
        "sub/report.json",
        "index.html",
        "index.json",
    ]


@pytest.mark.parametrize("location", ["/a/b", "a/b.json", "C:\\x"])
def test_a_path_is_a_path(location: str) -> None:
    assert storage.located(location) == Path(location)


def test_a_file_url_is_a_path() -> None:
    assert storage.located("file:///a/b%20c") == Path("/a/b c")
    with pytest.raises(SourceError, match="no such report"):
        load_any("file:///nowhere/at/all")


def test_a_local_capture_command_says_where_it_went(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("from tests.models import llama\n")
    arrays: dict[str, Any] = {n: t.numpy() for n, t in inputs_for("llama").items()}
    np.savez(tmp_path / "in.npz", **arrays)
    spec = f"pytorch:{tmp_path}/model.py:llama"
    result = run("capture", spec, "--inputs", tmp_path / "in.npz", "--out", "memory://run.capture")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("memory://run.capture: ")
    again = run("compare", "--ref", spec, "--cand", "memory://run.capture", "--inputs", tmp_path / "in.npz")
    assert again.exit_code == 0 and "equal to the bit" in again.output
    manifest = json.loads(fsspec.filesystem("memory").cat_file(f"/run.capture/{MANIFEST}"))
    assert manifest["schema"] == 1
