"""Reports of real engines load, render in every format, and say what was seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from divergence.reports import write_all
from divergence.reports.chain import render_chain
from divergence.reports.html import render_html
from divergence.reports.markdown import render_markdown
from divergence.reports.terminal import render
from divergence.result import Comparison
from tests.reports.recorded import CHAIN, FOLDER, PAIRS, SMALL, recorded, recorded_chain, text


def test_every_file_of_the_folder_is_tried() -> None:
    assert {f"{name}.report.json.gz" for name in (*PAIRS, CHAIN)} == {p.name for p in FOLDER.glob("*.gz")}


@pytest.mark.parametrize("name", PAIRS)
def test_a_report_of_an_engine_is_read_and_written_alike(name: str) -> None:
    written, again = json.loads(text(name)), json.loads(recorded(name).to_json())
    assert again["diagnosis"] == []  # reports of that version have none
    assert {key: again[key] for key in written} == written


@pytest.mark.parametrize("name", PAIRS)
def test_a_report_of_an_engine_renders(name: str) -> None:
    report = recorded(name)
    terminal, summary, page = render(report), render_markdown(report), render_html(report)
    assert report.verdict == "fail"
    for shown in (terminal, summary, page):
        assert "FAIL" in shown.upper()
        assert "layers.0.key" in shown or report.first_divergence is None
    assert len(summary.splitlines()) < 60


def test_the_chain_renders(tmp_path: Path) -> None:
    chain = recorded_chain()
    shown = render_chain(chain)
    assert chain.names == ("smollm2.onnx", "smollm2-fp16.plan")
    assert "smollm2-fp16.plan" in shown
    pages = write_all(chain, tmp_path)
    assert [page.parent.name for page in pages[1:]] == ["1-smollm2.onnx", "2-smollm2-fp16.plan"]
    assert chain["smollm2-fp16.plan"].first_divergence == chain.comparisons[1].first_divergence
    assert chain.comparisons[1].first_divergence is not None
    assert chain.comparisons[1].first_divergence.site == "layers.0.key"


@pytest.mark.parametrize("name", ["small-fp16", "small-bf16", "full-fp16"])
def test_a_weakly_typed_half_engine_is_wrong_in_its_keys(name: str) -> None:
    report = recorded(name)
    assert report.first_divergence is not None
    assert report.first_divergence.site == "layers.0.key"
    keys = [s for s in report.sites if s.tensor == "key"]
    assert keys
    assert all(s.verdict == "fail" for s in keys)
    spread = report.site("layers.0.key").profile.token
    assert spread[-1] > 10 * spread[0]
    assert [clause["role"] for clause in report.contract["ignored"]] == ["rotary"]


@pytest.mark.parametrize("name", ["small-fp32", "small-tf32", "small-typed_fp16"])
def test_the_others_are_right_at_every_site(name: str) -> None:
    """Their verdict is for outputs that were not matched alone, as the README beside them says."""
    report = recorded(name)
    assert {s.verdict for s in report.sites} == {"pass"}
    missing = [u.site for u in report.unmatched if u.state == "missing in candidate"]
    assert missing == ["output.0", "output.1", "output.2"]
    assert report.contract["ignored"] == []


def test_reports_name_no_machine() -> None:
    for name in (*PAIRS, CHAIN):
        assert "/tmp" not in text(name)  # noqa: S108 - looked for, not used
        assert "/home" not in text(name)


def test_the_small_engines_are_of_one_model_and_input() -> None:
    reports: list[Comparison] = [recorded(name) for name in SMALL]
    assert len({r.environment["inputs_digest"] for r in reports}) == 1
    assert len({r.environment["reference"]["model_digest"] for r in reports}) == 1
