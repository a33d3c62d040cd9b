"""What can be said of a build before TensorRT is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from divergence import demo
from divergence.errors import ConfigurationError, SourceError
from divergence.probes.tensorrt.build import BuildOptions, build_engine, parse_shapes


def test_shapes_are_read() -> None:
    assert parse_shapes(["x=1x128", "y=1x1,1x8,1x64", "y=2x1,2x8,2x64"]) == {
        "x": [((1, 128), (1, 128), (1, 128))],
        "y": [((1, 1), (1, 8), (1, 64)), ((2, 1), (2, 8), (2, 64))],
    }


@pytest.mark.parametrize(
    "text", ["x", "x=", "=1x2", "x=1xa", "x=1,2", "x=1x2,1x2x3,1x2", "x=1x2,1x2,1x2,1x2"]
)
def test_shapes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigurationError, match="write it as NAME=SHAPE"):
        parse_shapes([text])


@pytest.mark.parametrize(
    ("out", "options", "said"),
    [
        ("engine.bin", BuildOptions(), "name the engine"),
        ("engine.plan", BuildOptions(precision="fp17"), "one of fp32, tf32"),
        ("engine.plan", BuildOptions(level=6), "levels 0 to 5"),
        ("absent/engine.plan", BuildOptions(), "does not exist"),
        ("engine.plan", BuildOptions(precision="int8"), "QuantizeLinear"),
        ("engine.plan", BuildOptions(profiles=parse_shapes(["inpt_ids=1x8"])), "no such input"),
    ],
)
def test_options_that_do_not_suit(tmp_path: Path, out: str, options: BuildOptions, said: str) -> None:
    model = tmp_path / "model.onnx"
    demo.write_bundled("clean", model)
    with pytest.raises(ConfigurationError, match=said):
        build_engine(model, tmp_path / out, options, inputs=demo.inputs())


def test_without_a_device_the_model_is_read_and_the_build_refused(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    demo.write_bundled("clean", model)
    with pytest.raises(SourceError, match="needs a CUDA device"):
        build_engine(model, tmp_path / "engine.plan", BuildOptions(), inputs=demo.inputs())
    assert not (tmp_path / "engine.plan").exists()


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none\.onnx"):
        build_engine(tmp_path / "none.onnx", tmp_path / "engine.plan", BuildOptions())
