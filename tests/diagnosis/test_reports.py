"""What a diagnosis leaves behind: report.json, `divergence explain`, the folder for replay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
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


USERS = """
import torch
from divergence import demo
from divergence.demo.model import DecoderLayer
from users_neighbour import gain

class Layer(DecoderLayer):
    pass

def load():
    model = demo.load()
    for layer in model.modules():
        if isinstance(layer, DecoderLayer):
            layer.__class__ = Layer
    return model

def faulty():
    model = load()
    with torch.no_grad():
        model.layers[1].self_attn.v_proj.weight.mul_(gain())
    return model

def inputs():
    return demo.inputs()
"""


@pytest.mark.parametrize("moved", [False, True])
def test_a_layer_of_a_users_file_replays_alone_anywhere(moved: bool, tmp_path: Path) -> None:
    """Whether the file is still there or not."""
    (tmp_path / "users.py").write_text(USERS)
    (tmp_path / "users_neighbour.py").write_text("def gain():\n    return 1.02\n")
    file = tmp_path / "users.py"
    sources = [
        "--ref",
        f"pytorch:{file}:load",
        "--cand",
        f"pytorch:{file}:faulty",
        "--inputs",
        f"{file}:inputs",
    ]
    repro = ["--repro", str(tmp_path / "repro"), "--no-diagnosis"]
    ran = CliRunner().invoke(main, ["compare", *sources, *repro])
    assert ran.exit_code == 1, ran.output
    assert "can be replayed alone" in " ".join(ran.output.split())
    if moved:
        file.unlink()
    (tmp_path / "elsewhere").mkdir()
    again = subprocess.run(
        [sys.executable, str(tmp_path / "repro" / "replay.py")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path / "elsewhere",
    )
    assert again.returncode == 0, again.stderr
    assert "max difference 0\n" in again.stdout
    assert "value: the candidate is off by 0.02 " in again.stdout


def test_a_layer_that_no_other_process_can_load_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose class a program has put together."""
    reference = MODELS["llama"]()
    candidate = planted(reference, _gain)
    kind = type(layer(reference, 1))
    own = ModuleType("put_together")
    own.Layer = type("Layer", (kind,), {"__module__": "put_together", "__qualname__": "Layer"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "put_together", own)
    layer(reference, 1).__class__ = own.Layer
    result = diagnosed(reference, candidate, inputs_for("llama"), repro=tmp_path, diagnose=False)
    (note,) = [note for note in result.notes if "replay.py" in note]
    assert "replay.py cannot load it: it needs put_together, which no other process finds" in note


def test_a_layer_that_cannot_be_pickled_is_an_error(tmp_path: Path) -> None:
    reference = MODELS["llama"]()
    candidate = planted(reference, _gain)
    layer(reference, 1).helper = lambda x: x
    with pytest.raises(SourceError, match="cannot be written for replay"):
        diagnosed(reference, candidate, inputs_for("llama"), repro=tmp_path)
