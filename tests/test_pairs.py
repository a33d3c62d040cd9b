"""Pairs here, one after another: every one has its answer, whatever becomes of the others."""

from __future__ import annotations

import contextlib
import html
import json
import signal
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from fsspec.implementations.memory import MemoryFileSystem
from torch import nn

import divergence
from divergence import Pairs, demo
from divergence.chain_result import load_any
from divergence.cli import main
from divergence.config import Config
from divergence.errors import ConfigurationError, SourceError
from divergence.pairs import compare_pairs
from divergence.pairs_result import PairResult
from divergence.reports import write_all, write_over_pairs
from divergence.reports.index import entries_of
from divergence.reports.pairs import render_pairs, render_pairs_markdown
from divergence.result import Comparison
from divergence.verdict import of_several
from tests.model_file import MODEL
from tests.models import inputs_for, llama
from tests.reports import cases


def sample(tokens: int) -> dict[str, torch.Tensor]:
    return {name: tensor[:, :tokens] for name, tensor in inputs_for("llama").items()}


def faulty() -> nn.Module:
    model: nn.Module = llama()
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.v_proj.weight").mul_(1.02)
    return model


def plain(pair: PairResult) -> dict[str, Any]:
    """A report without times."""
    content: dict[str, Any] = json.loads(pair.comparison.to_json())
    for name in ("date", "seconds"):
        content["environment"].pop(name, None)
    return content


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a model file and two samples, which is the current folder."""
    (tmp_path / "model.py").write_text(MODEL)
    for tokens in (4, 6):
        arrays: dict[str, Any] = {n: t.numpy() for n, t in sample(tokens).items()}
        np.savez(tmp_path / f"in{tokens}.npz", **arrays)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


COMPARE = ("compare", "--ref", "pytorch:model.py:load", "--inputs", "in4.npz", "--inputs", "in6.npz")


def test_every_pair_is_what_compare_says_of_it_alone() -> None:
    cands, samples = [llama(), faulty()], [sample(4), sample(6)]
    found = compare_pairs(llama(), cands, samples, names=["same", "faulty"], config=Config())
    assert [pair.name for pair in found.pairs] == [
        "same on inputs",
        "faulty on inputs",
        "same on inputs#2",
        "faulty on inputs#2",
    ]
    assert (found.verdict, found.reason) == ("fail", "2 of 4 pairs fail")
    alone = [divergence.compare(llama(), cand, given, config=Config()) for given in samples for cand in cands]
    assert [plain(pair) for pair in found.pairs] == [plain(PairResult("", "", c, "")) for c in alone]
    assert found["faulty", "inputs#2"].first_divergence is not None
    with pytest.raises(KeyError):
        found["faulty", "inputs#3"]


def test_the_order_of_candidates_changes_no_report(tmp_path: Path) -> None:
    """The floors that a failing candidate has measured must not be those by which the next one is judged."""
    order = ["clean", "rotary-bf16"]
    for name in order:
        demo.write_bundled(name, tmp_path / f"{name}.onnx")
    found = [
        compare_pairs(
            demo.load(),
            [tmp_path / f"{name}.onnx" for name in names],
            [demo.inputs(tokens=24)],
            names=names,
            samples=["s"],
            config=Config(),
        )
        for names in (order, order[::-1])
    ]
    for name in order:
        one, other = (pairs[name, "s"] for pairs in found)
        assert one.policy == other.policy and one.sites == other.sites
    assert found[0]["clean", "s"].policy.floor_from.startswith("no run was needed")


def test_the_reference_runs_once_for_a_sample() -> None:
    runs: list[tuple[int, ...]] = []
    model = llama()
    model.register_forward_pre_hook(
        lambda _, args, kwargs: runs.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    compare_pairs(model, [llama(), llama(), llama()], [sample(4), sample(6)], config=Config())
    assert runs == [(2, 4), (2, 6)]


def test_pairs_that_cannot_be_answered_lose_no_others(folder: Path) -> None:
    cands = ["pytorch:model.py:load", "absent.onnx", "pytorch:model.py:raises"]
    bad: Any = {"input_ids": torch.full((1, 4), 5000)}
    seen: list[str] = []
    found = compare_pairs(
        "pytorch:model.py:load",
        cands,
        [sample(4), "absent.npz", bad],
        config=Config(),
        done=lambda pair: seen.append(pair.folder),
    )
    assert [pair.comparison.verdict for pair in found.pairs] == ["pass", *["error"] * 8]
    assert found.reason == "8 of 9 pairs could not be answered"
    reasons = [pair.comparison.reason for pair in found.pairs]
    assert "no such ONNX file" in reasons[1] and "no weights here" in reasons[2]
    assert all("absent.npz: no such file" in reason for reason in reasons[3:6])
    assert all("IndexError" in reason for reason in reasons[6:])
    assert seen == [pair.folder for pair in found.pairs] and len(set(seen)) == 9
    assert all("\n" not in reason for reason in reasons)


def test_a_reference_that_cannot_be_opened_answers_nothing(folder: Path) -> None:
    found = compare_pairs("pytorch:model.py:raises", ["pytorch:model.py:load"], [sample(4)], config=Config())
    assert found.verdict == "error" and "no weights here" in found.pairs[0].comparison.reason


def test_an_unexpected_error_is_one_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    from divergence.job import Job

    original = Job.run

    def failing(self: Job, cand: object) -> Comparison:
        if self.name == "candidate-1":
            raise RuntimeError("CUDA error: device-side assert\nmore")
        return original(self, cand)

    monkeypatch.setattr(Job, "run", failing)
    found = compare_pairs(llama(), [llama(), llama()], [sample(4)], config=Config())
    assert [pair.comparison.verdict for pair in found.pairs] == ["error", "pass"]
    assert found.pairs[0].comparison.reason == "unexpected RuntimeError: CUDA error: device-side assert"


@pytest.mark.parametrize(
    ("cands", "inputs", "options", "message"),
    [
        ([], [{}], {}, "at least one candidate"),
        (["a"], [], {}, "at least one sample"),
        ("model.onnx", [{}], {}, "a list of candidates"),
        (["a"], "in.npz", {}, "a list of samples"),
        (["a"], {"x": 1}, {}, "a list of samples"),
        (["a", "b"], [{}], {"names": ["x", "x"]}, "none twice"),
        (["a"], [{}], {"samples": ["x", "y"]}, "2 names for 1 samples"),
        (["a"], [{}], {"ray": "local:0"}, "local:2"),
        (["a"], [{}], {"ray": "local:many"}, "local:2"),
        (["a"], [{}], {"ray": "local", "keep": Path("x")}, "not kept on Ray"),
    ],
)
def test_what_cannot_be_asked_is_refused(cands: Any, inputs: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        compare_pairs("a", cands, inputs, config=Config(), **options)


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        ([], ("error", "Nothing was compared")),
        (["pass"], ("pass", "All pairs pass")),
        (["pass", "fail"], ("fail", "1 of 2 pairs fails")),
        (["error", "pass"], ("error", "1 of 2 pairs could not be answered")),
        (["error", "fail", "fail"], ("error", "1 of 3 pairs could not be answered, 2 fail")),
    ],
)
def test_what_could_not_be_answered_counts_more_than_what_fails(verdicts: Any, said: Any) -> None:
    assert of_several(verdicts, "pair") == said


# --- the command line and the reports -------------------------------------------------------------------


def test_the_command_writes_all_reports_and_an_index(folder: Path) -> None:
    args = ("--cand", "pytorch:model.py:load", "--cand", "pytorch:model.py:faulty", "--cand", "absent.onnx")
    result = run(*COMPARE, *args, "--out", "out")
    assert result.exit_code == 2
    assert "ERROR  2 of 6 pairs could not be answered, 2 fail" in result.stdout
    assert result.stdout.splitlines()[-1] == "report: out/index.html"
    names = ["load-in4.npz", "faulty-in4.npz", "absent.onnx-in4.npz"]
    names += [name.replace("in4", "in6") for name in names]
    folders = [f"{i}-{name}" for i, name in enumerate(names, 1)]
    files = ["index.html", "index.json", "junit.xml", "summary.md"]
    assert sorted(p.name for p in (folder / "out").iterdir()) == sorted([*folders, *files])
    for name in folders:
        assert {p.name for p in (folder / "out" / name).iterdir()} >= {"report.json", "report.html"}
    index = json.loads((folder / "out/index.json").read_text())
    assert (index["kind"], index["counts"]) == ("pairs", {"pass": 2, "fail": 2, "error": 2})
    assert sorted(entry["folder"] for entry in index["comparisons"]) == folders
    suites = ET.fromstring((folder / "out/junit.xml").read_text())  # noqa: S314 (ours)
    assert [suite.attrib["name"] for suite in suites][1] == "divergence: faulty on in4.npz"
    assert [int(suite.attrib["errors"]) for suite in suites] == [0, 0, 1, 0, 0, 1]
    again = run("report", "out")
    assert (again.exit_code, again.stdout) == (2, result.stdout)


@pytest.mark.parametrize(("cand", "status"), [("load", 0), ("faulty", 1)])
def test_the_exit_status_is_that_of_all_pairs(cand: str, status: int, folder: Path) -> None:
    result = run(*COMPARE, "--cand", f"pytorch:model.py:{cand}")
    assert result.exit_code == status, result.output


def test_one_sample_stays_a_chain(folder: Path) -> None:
    args = ("--cand", "pytorch:model.py:load", "--cand", "pytorch:model.py:load")
    result = run("compare", "--ref", "pytorch:model.py:load", "--inputs", "in4.npz", *args)
    assert result.exit_code == 0 and "each candidate against the one before it" in result.stdout


def test_captures_are_kept_by_sample(folder: Path) -> None:
    result = run(*COMPARE, "--cand", "pytorch:model.py:load", "--out", "out", "--keep-captures")
    assert result.exit_code == 0, result.output
    kept = sorted(p.relative_to(folder / "out").as_posix() for p in (folder / "out").glob("*/*.capture"))
    assert kept == [f"sample-{i}/{who}.capture" for i in (1, 2) for who in ("candidate-1", "reference")]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--repro", "x"), "--repro writes the first failing layer of one candidate"),
        (("--ray", "local", "--keep-captures", "--out", "x"), "--keep-captures keeps what ran here"),
        (("--ray-gpus", "1"), "give --ray too"),
        (("--ray", "local:x"), "write it as local or local:2"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(
    args: Sequence[str], message: str, folder: Path
) -> None:
    result = run(*COMPARE, "--cand", "pytorch:model.py:load", *args)
    assert result.exit_code == 2 and message in result.output
    assert len(result.output.splitlines()) == 1


INTERRUPTED = "error: interrupted; the reports of 1 pair are in out, without an index"


def test_an_interrupted_run_keeps_what_was_done(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from divergence.job import Job

    original = Job.run

    def interrupted(self: Job, cand: object) -> Comparison:
        if self.name == "candidate-2":
            raise KeyboardInterrupt
        return original(self, cand)

    monkeypatch.setattr(Job, "run", interrupted)
    args = ("--cand", "pytorch:model.py:load", "--cand", "pytorch:model.py:faulty", "--out", "out")
    result = run(*COMPARE, *args)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == INTERRUPTED
    assert [p.name for p in (folder / "out").iterdir()] == ["1-load-in4.npz"]


def test_an_interrupt_that_was_dropped_ends_the_run_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from divergence.report_commands import Reports

    original = Reports.add

    def interrupted(self: Reports, pair: PairResult) -> None:
        original(self, pair)
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Reports, "add", interrupted)
    args = ("--cand", "pytorch:model.py:load", "--cand", "pytorch:model.py:faulty", "--out", "out")
    result = run(*COMPARE, *args)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == INTERRUPTED


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty file system in memory."""
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    return fsspec.filesystem("memory")


def test_pairs_go_to_an_address_and_come_back(folder: Path, memory: Any) -> None:
    args = ("--cand", "pytorch:model.py:load", "--cand", "pytorch:model.py:faulty")
    result = run(*COMPARE, *args, "--out", "memory://runs/7")
    assert result.exit_code == 1, result.output
    assert result.stdout.splitlines()[-1] == "report: memory://runs/7/index.html"
    assert memory.exists("/runs/7/2-faulty-in4.npz/report.html")
    again = run("report", "memory://runs/7")
    assert (again.exit_code, again.stdout) == (1, result.stdout)


def pairs() -> Pairs:
    """Of every kind."""
    made = [
        PairResult(name, f"sample-{i}", case, f"{name}-{i}")
        for i in (1, 2)
        for name, case in cases.CASES.items()
    ]
    return Pairs.of(made, "the reference", {"pairs": len(made), "seconds": 1.5}, "divergence compare ...")


def write(written: Pairs, folder: Path) -> None:
    """All that is read back, without what takes long to draw."""
    for pair in written.pairs:
        pair.comparison.save(folder / pair.folder / "report.json")
    write_over_pairs(written, folder)


def test_pairs_are_read_back_as_they_were(tmp_path: Path) -> None:
    written = pairs()
    write(written, tmp_path)
    read = load_any(tmp_path)
    assert isinstance(read, Pairs)
    assert [p.name for p in read.pairs] == [p.name for p in written.pairs]
    assert (read.verdict, read.reason, read.environment) == (
        written.verdict,
        written.reason,
        written.environment,
    )
    assert [p.comparison.to_json() for p in read.pairs] == [p.comparison.to_json() for p in written.pairs]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "session"}, "the index of a session"),
        ({"schema": 9}, "index schema 9"),
        ({"comparisons": [{"folder": "../x", "number": 1}]}, "'../x' is no folder beside it"),
        ({"comparisons": 3}, "not an index of divergence"),
    ],
)
def test_an_index_that_was_tampered_with_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    write(Pairs.of(pairs().pairs[:1], "r", {}), tmp_path)
    content = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(SourceError, match=message):
        load_any(tmp_path)


def test_a_pair_whose_report_is_gone_is_no_pass(tmp_path: Path) -> None:
    write(Pairs.of(pairs().pairs[:2], "r", {}), tmp_path)
    (tmp_path / pairs().pairs[0].folder / "report.json").unlink()
    with pytest.raises(SourceError, match="no such report"):
        load_any(tmp_path)


def test_a_report_that_was_there_before_is_not_taken_for_the_pairs(tmp_path: Path) -> None:
    write_all(cases.passes(1), tmp_path)
    write(pairs(), tmp_path)
    assert isinstance(load_any(tmp_path), Pairs)


def test_the_page_links_every_pair_and_asks_for_nothing(tmp_path: Path) -> None:
    write(pairs(), tmp_path)
    page = (tmp_path / "index.html").read_text("utf-8")
    for pair in pairs().pairs:
        assert f'href="{pair.folder}/report.html"' in page
    assert "<script" not in page and "default-src 'none'" in html.unescape(page)
    assert "all candidates on all samples" in page and "test session" not in page


@pytest.mark.parametrize("width", [40, 100, 200])
def test_the_terminal_shows_every_pair(width: int) -> None:
    shown = render_pairs(pairs(), width=width, ascii=True)
    assert all(len(line) <= width for line in shown.splitlines())
    assert shown.isascii() and "\x1b" not in shown
    for pair in pairs().pairs:
        if pair.comparison.verdict != "pass":
            assert pair.candidate[:20] in shown


def test_the_summary_is_short_and_nothing_in_it_is_markup() -> None:
    many = [PairResult(f"c{i}|<b>", f"s{j}", cases.evil(), f"{i}-{j}") for i in range(30) for j in range(12)]
    summary = render_pairs_markdown(Pairs.of(many, "r", {}), "https://a.b/c")
    assert len(summary.splitlines()) <= 60
    assert "more pairs in the index" in summary and "(https://a.b/c)" in summary
    assert "<b>" not in summary.replace("`c", "").replace("<b>`", "")


def test_entries_are_numbered_by_their_place() -> None:
    entries = entries_of(pairs())
    assert [entry["number"] for entry in entries] == list(range(1, len(entries) + 1))
    assert all(json.loads(json.dumps(entry, allow_nan=False)) == entry for entry in entries)
