"""Layers that a graph runs more than once: every call has values of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from divergence.captures import Capture
from divergence.errors import SourceError
from divergence.pipeline import record
from divergence.probes import silent
from divergence.probes.onnx import OnnxProbe
from divergence.probes.pytorch import PyTorchProbe
from tests.exports import exported, observed

pytestmark = pytest.mark.filterwarnings("ignore")


class Block(nn.Module):
    """A layer that multiplies with its weights, and with what it makes of `side` if told to."""

    def __init__(self, *, gated: bool) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(96, 100), nn.Linear(100, 96), nn.LayerNorm(96)
        self.gated = gated

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        if self.gated:
            x = x * torch.sigmoid(side)
        out: Tensor = self.norm(x + self.down(torch.tanh(self.up(x))))
        return out


class Looped(nn.Module):
    """Runs its only layer three times."""

    def __init__(self, *, gated: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(gated=gated)])
        self.head = nn.Linear(96, 5)

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layers[0](x, side)
        out: Tensor = self.head(x)
        return out


def both(folder: Path, *, gated: bool) -> tuple[Capture, Path, Mapping[str, Tensor]]:
    """What the module held, and its export."""
    model = Looped(gated=gated).eval().requires_grad_(False)
    inputs = {
        name: torch.randn(1, 6, 96, generator=torch.Generator().manual_seed(1)) for name in ("x", "side")
    }
    reference = record(PyTorchProbe(model), inputs, folder / "ref.capture", detail=False, progress=silent)
    return reference, exported(model, inputs, folder / "looped.onnx"), inputs


def test_every_call_of_a_layer_has_its_own_value(tmp_path: Path) -> None:
    """The exporter transposes weights once, among the nodes of the first call, which makes it longer."""
    reference, path, inputs = both(tmp_path, gated=False)
    seen = observed(OnnxProbe(path), inputs)
    assert [s for s in seen if "hidden" in s] == ["layers.0.hidden", "layers.0.hidden@2", "layers.0.hidden@3"]
    for site in reference.sites:
        if site.layer is not None:
            assert torch.allclose(seen[str(site)].tensor, reference.tensor(site), atol=1e-5), site


def test_calls_that_the_graph_does_not_tell_apart_are_not_mistaken(tmp_path: Path) -> None:
    """The gate is computed once for all calls, so that these are not alike: their values tell them."""
    reference, path, inputs = both(tmp_path, gated=True)
    with pytest.raises(SourceError, match="does not tell its calls apart"):
        observed(OnnxProbe(path), inputs)
    seen = observed(OnnxProbe(path, reference=reference), inputs)
    for site in reference.sites:
        if site.layer is not None and str(site) in seen:
            assert torch.allclose(seen[str(site)].tensor, reference.tensor(site), atol=1e-5), site
            assert "by value" in seen[str(site)].found
    assert "layers.0.hidden@3" in seen
