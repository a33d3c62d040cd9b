"""Exports with QuantizeLinear and DequantizeLinear around their products."""

from __future__ import annotations

from pathlib import Path

import pytest

from divergence.config import Config
from divergence.demo import inputs, load, write_bundled
from divergence.pipeline import compare
from divergence.probes.onnx import OnnxProbe
from tests.tensorrt.quantised import quantise

KV_HIDDEN = ("key", "value", "hidden")


@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.05), ("fp8", 0.2)])
def test_sites_are_the_models_values_and_not_their_codes(tmp_path: Path, kind: str, limit: float) -> None:
    clean = tmp_path / "clean.onnx"
    write_bundled("clean", clean)
    path = quantise(clean, tmp_path / f"{kind}.onnx", kind)
    found = [i for i in OnnxProbe(path).describe(inputs()).sites if i.site.tensor in KV_HIDDEN]
    assert {info.dtype for info in found} == {"float32"}
    result = compare(load(), str(path), inputs(), config=Config(), precision=kind, diagnose=False)
    layers = [site for site in result.sites if site.layer is not None]
    assert len(layers) == 18
    for site in layers:
        assert site.rel_l2 is not None
        assert 0 < site.rel_l2 < limit, site.site
    assert not [s.site for s in layers if s.verdict != "pass"]
