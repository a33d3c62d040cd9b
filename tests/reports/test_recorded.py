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
from tests.reports.recorded import (
    CHAINS,
    FOLDER,
    FULL,
    PAIRS,
    SMALL,
    recorded,
    recorded_chain,
    recorded_engine_of,
    text,
)

WRONG = ("small-fp16", "small-bf16", "full-fp16", "full-bf16")
"""Engines whose types TensorRT chose, in a half precision."""

RIGHT = tuple(name for name in PAIRS if name not in WRONG)


def failing(report: Comparison) -> list[str]:
    """Sites that fail, in execution order."""
    return [s.site for s in report.sites if s.verdict == "fail"]


def latency(name: str) -> float:
    """Milliseconds of one run of an engine."""
    taken: float = recorded(name).environment["candidate"]["latency_ms"]
    return taken


def test_every_file_of_the_folder_is_tried() -> None:
    assert {f"{name}.report.json.gz" for name in (*PAIRS, *CHAINS)} == {p.name for p in FOLDER.glob("*.gz")}


@pytest.mark.parametrize("name", PAIRS)
def test_a_report_of_an_engine_is_read_and_written_alike(name: str) -> None:
    assert json.loads(recorded(name).to_json()) == json.loads(text(name))


@pytest.mark.parametrize("name", CHAINS)
def test_a_report_of_a_chain_is_read_and_written_alike(name: str) -> None:
    assert json.loads(recorded_chain(name).to_json()) == json.loads(text(name))


@pytest.mark.parametrize("name", PAIRS)
def test_a_report_of_an_engine_renders(name: str) -> None:
    report = recorded(name)
    terminal, summary, page = render(report), render_markdown(report), render_html(report)
    verdict = "fail" if name in WRONG else "pass"
    assert terminal.startswith(verdict.upper())
    assert summary.splitlines()[0].endswith(f"divergence: {verdict}")
    assert f"<title>{verdict.upper()}" in page
    for shown in (terminal, summary, page):
        assert "layers.0.key" in shown or name in RIGHT
        assert ("rotary angles run in" in shown) is (name in WRONG)
    assert len(summary.splitlines()) < 60


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_renders(name: str, tmp_path: Path) -> None:
    chain = recorded_chain(name)
    assert chain.names == ("smollm2.onnx", f"{name}.plan")
    assert f"{name}.plan" in render_chain(chain)
    pages = write_all(chain, tmp_path)
    assert [page.parent.name for page in pages[1:]] == ["1-smollm2.onnx", f"2-{name}.plan"]


@pytest.mark.parametrize("name", RIGHT)
def test_an_engine_bound_to_its_types_or_in_fp32_passes_whole(name: str) -> None:
    report = recorded(name)
    assert report.verdict == "pass", report.reason
    assert {s.verdict for s in report.sites} == {"pass"}
    assert not report.unmatched, "keys, values and hidden_states are matched with the model's tuple"
    assert len(report.sites) == (27 if name in SMALL else 57)
    assert report.first_divergence is None
    assert not report.causes
    assert not [clause for clause in report.contract["ignored"] if clause["role"] == "rotary"]


@pytest.mark.parametrize("name", WRONG)
def test_a_weakly_typed_half_engine_is_wrong_in_its_keys_alone(name: str) -> None:
    report = recorded(name)
    assert report.verdict == "fail"
    assert report.first_divergence is not None
    assert report.first_divergence.site == "layers.0.key"
    layers = 8 if name in SMALL else 18
    assert failing(report) == [f"layers.{layer}.key" for layer in range(layers)]
    assert not report.unmatched
    first, value = report.site("layers.0.key"), report.site("layers.0.value")
    assert first.profile.token[-1] > 10 * first.profile.token[0]
    assert max(value.profile.token) < 3 * min(value.profile.token)
    assert report.contract["ignored"][0]["role"] == "rotary"


@pytest.mark.parametrize("name", WRONG)
def test_its_cause_is_the_rotary_angles_with_the_variant(name: str) -> None:
    (cause,) = recorded(name).causes
    precision = name.rpartition("-")[2]
    assert (cause.id, cause.site) == ("rope_precision", "layers.0.key")
    assert cause.parameters["precision"] == precision
    assert cause.parameters["rounded"] == ["position", "inv_freq", "angle"]
    assert any(line.startswith(f"the engine ran its rotary in {precision}") for line in cause.evidence)
    assert cause.explained is not None
    if name in FULL:
        assert cause.explained > 0.999
    else:
        assert 0.98 < cause.explained < 0.99


@pytest.mark.parametrize("name", [*WRONG, *CHAINS])
def test_what_the_angles_leave_is_as_large_as_the_error_of_the_value(name: str) -> None:
    """The value takes the same norm and the same kind of product, but is not rotated."""
    report = recorded_engine_of(name)
    key, value = report.site("layers.0.key").rel_l2, report.site("layers.0.value").rel_l2
    explained = report.causes[0].explained
    assert key is not None and value is not None and explained is not None
    left = key * (1 - explained) ** 0.5
    assert 0.8 * value < left < 1.25 * value


def test_the_strongly_typed_engine_is_as_fast_as_the_wrong_one() -> None:
    """Figures of one session, read from the reports; nothing is timed here."""
    assert latency("full-typed_fp16") < 1.05 * latency("full-fp16")
    assert latency("full-fp16") < 0.5 * latency("full-tf32") < 0.25 * latency("full-fp32")


@pytest.mark.parametrize("name", CHAINS)
def test_the_export_of_smollm2_brings_nothing_in_and_the_engine_does(name: str) -> None:
    chain = recorded_chain(name)
    exported, engine = chain.comparisons
    assert [step.verdict for step in chain.steps] == ["pass", "fail"]
    assert exported.verdict == "pass", exported.reason
    assert not exported.causes
    assert engine.verdict == "fail"
    assert engine.first_divergence is not None
    assert engine.first_divergence.site == "layers.0.key"
    assert chain.steps[1].site == "layers.0.key"
    assert engine.site("layers.0.value").verdict == "pass"
    assert len(exported.sites) == len(engine.sites) == 91
    assert not engine.unmatched


@pytest.mark.parametrize("name", CHAINS)
def test_looking_changed_neither_engine_of_smollm2(name: str) -> None:
    observer = recorded_engine_of(name).environment["candidate"]["observer"]
    assert observer["changed"] is False
    assert [output["bit_equal"] for output in observer["outputs"].values()] == [True]


def test_smollm2_in_fp16_is_lost_where_squares_overflow() -> None:
    report = recorded_engine_of("smollm2-fp16")
    angles, squares = report.causes
    assert (angles.id, angles.site) == ("rope_precision", "layers.0.key")
    assert angles.parameters["rounded"] == ["angle"]
    assert angles.explained is not None and 0.96 < angles.explained < 0.97
    assert (squares.id, squares.site) == ("overflow_norm", "layers.3.key")
    assert squares.explained is not None and squares.explained > 0.99
    assert {site for site in failing(report) if site.endswith(".value")} == {
        f"layers.{layer}.value" for layer in range(3, 30)
    }
    logits = report.site("output.logits")
    assert logits.rel_l2 is not None and logits.rel_l2 > 0.99
    assert all(site.cand_nonfinite == 0 for site in report.sites), "nothing in it looks broken"


def test_smollm2_in_bf16_is_wrong_in_its_keys_and_right_at_its_end() -> None:
    report = recorded_engine_of("smollm2-bf16")
    (angles,) = report.causes
    assert (angles.id, angles.site) == ("rope_precision", "layers.0.key")
    assert angles.parameters["rounded"] == ["angle"]
    assert angles.explained is not None and 0.98 < angles.explained < 0.99
    assert not [site for site in failing(report) if site.endswith(".value")]
    logits = report.site("output.logits")
    assert logits.verdict == "pass"
    assert logits.introduced_ratio is not None and logits.introduced_ratio < 1.5


def test_reports_name_no_machine() -> None:
    for name in (*PAIRS, *CHAINS):
        assert "/tmp" not in text(name)  # noqa: S108 - looked for, not used
        assert "/home" not in text(name)


@pytest.mark.parametrize("names", [SMALL, FULL, CHAINS], ids=["small", "full", "smollm2"])
def test_engines_of_one_table_are_of_one_model_and_input(names: tuple[str, ...]) -> None:
    reports = [recorded_engine_of(name) for name in names]
    assert len({r.environment["inputs_digest"] for r in reports}) == 1
    assert len({r.environment["reference"]["model_digest"] for r in reports}) == 1
    assert len({r.environment["candidate"]["model_digest"] for r in reports}) == len(names)
