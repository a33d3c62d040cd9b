"""What a diagnosis leaves behind: report.json, `divergence explain`, the folder for replay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from divergence.cli import main
from divergence.errors import SourceError
from divergence.reports.explain import render_explanation
from divergence.reports.terminal import render
from divergence.result import Comparison, load_report
from tests.diagnosis.faults import diagnosed, layer, planted
from tests.models import MODELS, inputs_for


def _gain(model: Any) -> None:
    layer(model, 1).self_attn.v_proj.weight.mul_(1.02)


def _result(**options: Any) -> Comparison:
    reference = MODELS["llama"]()
    return diagnosed(reference, planted(reference, _gain), inputs_for("llama"), **options)


def test_causes_and_hypotheses_survive_the_report(tmp_path: Path) -> None:
    result = _result()
    result.save(tmp_path / "report.json")
    again = load_report(tmp_path)
    assert again.to_json() == result.to_json()
    assert again.causes[0].parameters["gain"] == pytest.approx(1.02, rel=1e-4)
    assert {h.id for h in again.diagnosis} > {"weight_scale", "bias_missing", "norm_eps"} - {"bias_missing"}


def test_the_terminal_report_names_the_cause_its_share_and_the_fix() -> None:
    text = render(_result(), width=300)
    assert (
        "'self_attn.v_proj.weight' is 1.02 times the reference's (explains 100 % of the error at "
        "layers.1.value)" in text
    )
    assert "checkpoint and in the export" in text


def test_explain_prints_every_cause_that_was_tried(tmp_path: Path) -> None:
    result = _result()
    result.save(tmp_path / "report.json")
    ran = CliRunner().invoke(main, ["explain", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    for hypothesis in result.diagnosis:
        assert f"{hypothesis.id}: " in ran.output
    assert "100 % of the error at layers.1.value" in ran.output


def test_explain_says_why_there_is_nothing_to_explain(tmp_path: Path) -> None:
    _result(diagnose=False).save(tmp_path / "report.json")
    ran = CliRunner().invoke(main, ["explain", str(tmp_path)])
    assert ran.exit_code == 0 and "--no-diagnosis" in ran.output


def test_explain_without_a_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such report"):
        load_report(tmp_path)


def test_an_unknown_cause_is_explained_with_its_facts() -> None:
    import torch

    def noise(model: Any) -> None:
        weight = layer(model, 1).mlp.down_proj.weight
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * 0.05)

    reference = MODELS["llama"]()
    text = render_explanation(diagnosed(reference, planted(reference, noise), inputs_for("llama")), width=200)
    assert "Unknown at layers.1.hidden" in text and "key, value pass" in text


def test_the_first_failing_layer_replays_alone(tmp_path: Path) -> None:
    result = _result(repro=tmp_path / "repro", diagnose=False)
    assert any("replay.py" in note for note in result.notes)
    ran = subprocess.run(
        [sys.executable, str(tmp_path / "repro" / "replay.py")], capture_output=True, text=True, check=True
    )
    assert "max difference 0\n" in ran.stdout
    assert "value: the candidate is off by 0.02 " in ran.stdout


def test_a_layer_that_cannot_be_pickled_is_an_error(tmp_path: Path) -> None:
    reference = MODELS["llama"]()
    candidate = planted(reference, _gain)
    layer(reference, 1).helper = lambda x: x
    with pytest.raises(SourceError, match="cannot be written for replay"):
        diagnosed(reference, candidate, inputs_for("llama"), repro=tmp_path)
