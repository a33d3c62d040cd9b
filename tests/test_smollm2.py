"""The main job on a real model: SmolLM2-135M against ONNX exports of itself, clean and faulty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from divergence.config import Config
from divergence.pipeline import compare
from divergence.result import Comparison
from tests import smollm2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not smollm2.available(), reason="no SmolLM2 in .models; make setup fetches it"),
    # The exporter and the tokenizer warn about themselves.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return smollm2.load()


@pytest.fixture(scope="module")
def prompt() -> Any:
    return smollm2.inputs()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smollm2")


def compared(model: Any, path: Path, prompt: Any) -> Comparison:
    """Compares, and deletes the export: each takes half a gigabyte."""
    result = compare(model, path, prompt, config=Config())
    for file in path.parent.glob(f"{path.stem}.onnx*"):
        file.unlink()
    return result


def test_its_own_export_passes(model: Any, prompt: Any, folder: Path) -> None:
    assert prompt["input_ids"].shape[1] >= 64
    result = compared(model, smollm2.export(model, prompt, folder / "fp32.onnx"), prompt)
    assert result.verdict == "pass", result.reason
    assert len(result.sites) == 91
    assert {s.layer for s in result.sites} == {*range(30), None}
    assert not result.unmatched
    assert result.policy.precision == "fp32"
    assert max(s.ratio or 0.0 for s in result.sites) < 2.5


def test_an_fp16_export_passes_by_the_fp16_floor(model: Any, prompt: Any, folder: Path) -> None:
    """Onnxruntime computes much of it in fp32 on the CPU, so it stays below the floor."""
    exported = smollm2.export(smollm2.half(model), prompt, folder / "fp16.onnx")
    result = compared(model, exported, prompt)
    assert result.verdict == "pass", result.reason
    assert (result.policy.precision, result.policy.precision_from) == ("fp16", "read from the candidate")
    assert result.policy.judged == "introduced"
    assert not result.unmatched
    assert all((s.rel_l2 or 0.0) > 1e-5 for s in result.sites)


def test_a_value_projection_two_percent_too_large_is_found(model: Any, prompt: Any, folder: Path) -> None:
    with smollm2.scaled_value(model):
        exported = smollm2.export(model, prompt, folder / "value.onnx")
    result = compared(model, exported, prompt)
    assert result.verdict == "fail"
    assert result.first_divergence is not None
    assert result.first_divergence.site == f"layers.{smollm2.FAULTY_LAYER}.value"
    assert result.site("layers.11.value").introduced == pytest.approx(smollm2.GAIN - 1, rel=1e-3)
    assert result.site("layers.29.hidden").verdict == "pass"
    assert result.site("layers.29.hidden").reason.startswith("propagated")


def test_rotary_angles_in_bf16_are_found_at_the_first_key(model: Any, prompt: Any, folder: Path) -> None:
    with smollm2.rotary_in_bf16(model):
        exported = smollm2.export(model, prompt, folder / "rotary.onnx")
    result = compared(model, exported, prompt)
    assert result.verdict == "fail"
    assert result.first_divergence is not None
    assert result.first_divergence.site == "layers.0.key"
    assert result.site("layers.0.value").verdict == "pass"
