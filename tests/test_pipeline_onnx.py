"""The main job between a PyTorch module with two stacks and its export to ONNX."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from divergence.config import Config
from divergence.pipeline import compare
from divergence.result import Comparison
from tests.exports import exported
from tests.models import MODELS, inputs_for

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# The exporter cannot trace T5's fused attention: its output is no view of the shape asked for.
KINDS: dict[str, Callable[[], Any]] = {
    "t5": functools.partial(MODELS["t5"], attn_implementation="eager"),
    "whisper": MODELS["whisper"],
}
SITES = {
    *(
        f"{stack}.layers.{i}.{t}"
        for stack in ("encoder", "decoder")
        for i in (0, 1)
        for t in ("key", "value", "hidden")
    ),
    *(f"decoder.layers.{i}.cross_{t}" for i in (0, 1) for t in ("key", "value")),
}


def judged(kind: str, path: Path, *, weight: str = "") -> Comparison:
    """The module against its export, in which `weight` is 2 % too large."""
    model, inputs = KINDS[kind](), inputs_for(kind, tokens=17)
    if weight:
        with torch.no_grad():
            model.get_parameter(weight).mul_(1.02)
    exported(model, inputs, path)
    return compare(KINDS[kind](), path, inputs, config=Config())


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_of_two_stacks_passes_with_every_site_matched(kind: str, tmp_path: Path) -> None:
    result = judged(kind, tmp_path / "m.onnx")
    assert result.verdict == "pass", result.reason
    assert result.unmatched == ()
    sites = {s.site for s in result.sites}
    assert sites >= SITES
    assert sites - SITES == {"output.logits", "output.encoder_last_hidden_state"}
    assert all((s.rel_l2 or 0.0) < 1e-6 for s in result.sites)


@pytest.mark.parametrize(
    ("kind", "weight", "site"),
    [
        ("t5", "encoder.block.1.layer.0.SelfAttention.v.weight", "encoder.layers.1.value"),
        ("t5", "decoder.block.0.layer.1.EncDecAttention.k.weight", "decoder.layers.0.cross_key"),
        ("whisper", "model.encoder.layers.1.self_attn.k_proj.weight", "encoder.layers.1.key"),
        ("whisper", "model.decoder.layers.1.encoder_attn.v_proj.weight", "decoder.layers.1.cross_value"),
    ],
)
def test_a_gain_of_two_percent_in_either_stack_is_found(
    kind: str, weight: str, site: str, tmp_path: Path
) -> None:
    result = judged(kind, tmp_path / "m.onnx", weight=weight)
    assert result.first_divergence is not None and result.first_divergence.site == site
    assert result.site(site).reason.startswith("introduces a relative error of 0.02,")
