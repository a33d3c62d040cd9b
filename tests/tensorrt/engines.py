"""Engines for the tests that have a device: of the bundled model, built once a session."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from divergence.demo import inputs, write_bundled
from divergence.probes.tensorrt.build import BuildOptions, build_engine
from divergence.probes.tensorrt.sidecar import beside

INPUTS = inputs()


@functools.cache
def folder() -> Path:
    """Where the engines of this session lie."""
    return Path(tempfile.mkdtemp(prefix="divergence-engines-"))


@functools.cache
def onnx(fault: str = "clean") -> Path:
    """The bundled model's export."""
    path = folder() / f"{fault}.onnx"
    write_bundled(fault, path)
    return path


@functools.cache
def engine(
    precision: str = "fp32", look: str = "outputs", fault: str = "clean", *, plain: bool = True
) -> Path:
    """An engine of the bundled model."""
    out = folder() / f"{fault}-{precision}-{look}.plan"
    options = BuildOptions(precision=precision, look=look, plain=plain)  # type: ignore[arg-type] # a literal
    build_engine(onnx(fault), out, options, inputs=INPUTS)
    return out


def alone(plan: Path, name: str) -> Path:
    """A copy of `plan` without its sidecar."""
    copy = folder() / name
    copy.write_bytes(plan.read_bytes())
    assert not beside(copy).exists()
    return copy
