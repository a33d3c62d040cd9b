"""Sources that the configuration names."""

from __future__ import annotations

from pathlib import Path

import pytest

from divergence import demo
from divergence.config import load_config
from divergence.pipeline import compare
from divergence.probes.tensorrt.options import EngineOptions
from divergence.probes.tensorrt.probe import TensorRTProbe
from divergence.sources import open_source
from tests.tensorrt.stand_in import write_plan

CONFIG = """
[sources.pytorch]
model = "model.py:load"
inputs = { input_ids = "ids", attention_mask = "mask" }
[sources.export]
path = "export.onnx"
inputs = { input_ids = "ids", attention_mask = "mask" }
"""
MODEL = "from divergence.demo import load\n"
INPUTS = {
    {"input_ids": "ids", "attention_mask": "mask"}[name]: tensor
    for name, tensor in demo.inputs(tokens=24).items()
}


@pytest.mark.parametrize(("fault", "verdict"), [("clean", "pass"), ("rotary-bf16", "fail")])
def test_inputs_may_have_other_names_on_both_sides(tmp_path: Path, fault: str, verdict: str) -> None:
    """Also where floors and replay run the reference again."""
    (tmp_path / "divergence.toml").write_text(CONFIG)
    (tmp_path / "model.py").write_text(MODEL)
    demo.write_bundled(fault, tmp_path / "export.onnx")
    config = load_config(tmp_path / "divergence.toml")
    result = compare("pytorch", "export", INPUTS, config=config)
    assert result.verdict == verdict, result.reason
    assert not [u for u in result.unmatched if u.state == "missing in candidate"]
    if verdict == "fail":
        assert result.policy.judged == "introduced"
        assert result.first_divergence is not None
        assert result.first_divergence.site == "layers.0.key"


def test_an_engine_is_run_as_the_configuration_says_unless_the_command_line_does(tmp_path: Path) -> None:
    write_plan(tmp_path / "engine.plan")
    text = '[sources.engine]\npath = "engine.plan"\nhost = "pycuda"\nplugins = ["a.so"]\n'
    (tmp_path / "divergence.toml").write_text(text)
    config = load_config(tmp_path / "divergence.toml")

    def options(given: EngineOptions | None) -> EngineOptions:
        probe = open_source("engine", config, engine=given)
        assert isinstance(probe, TensorRTProbe)
        return probe.options

    assert options(None) == EngineOptions(host="pycuda", plugins=("a.so",))
    assert options(EngineOptions(host="both", plugins=("b.so",))) == EngineOptions(
        host="both", plugins=("a.so", "b.so")
    )
