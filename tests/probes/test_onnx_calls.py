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
    """A layer that may multiply what it is given with a gate."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(size, 100), nn.Linear(100, size), nn.LayerNorm(size)

    def forward(self, x: Tensor, side: Tensor | None) -> Tensor:
        if side is not None:
            x = x * torch.sigmoid(side)
        out: Tensor = self.norm(x + self.down(torch.tanh(self.up(x))))
        return out


class Looped(nn.Module):
    """Runs its only layer three times, with a gate in the calls `gated`."""

    def __init__(self, gated: tuple[int, ...], size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.head, self.gated = nn.ModuleList([Block(size)]), nn.Linear(size, 5), gated

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        for call in range(3):
            x = self.layers[0](x, side if call in self.gated else None)
        out: Tensor = self.head(x)
        return out


def both(folder: Path, *gated: int, size: int = 96) -> tuple[Capture, Path, Mapping[str, Tensor]]:
    """What the module held, and its export."""
    model = Looped(gated, size).eval().requires_grad_(False)
    draws = torch.Generator().manual_seed(1)
    inputs = {name: torch.randn(1, 6, size, generator=draws) for name in ("x", "side")}
    reference = record(PyTorchProbe(model), inputs, folder / "ref.capture", detail=False, progress=silent)
    return reference, exported(model, inputs, folder / "looped.onnx"), inputs


@pytest.mark.parametrize("gated", [(), (0, 1, 2)])
@pytest.mark.parametrize("size", [96, 32])
def test_every_call_of_a_layer_has_its_own_value(gated: tuple[int, ...], size: int, tmp_path: Path) -> None:
    """What is the same in every call (transposed weights, the gate) is computed once, among the nodes
    of the first, which makes it longer. Small weights are transposed by the exporter, for each call anew."""
    reference, path, inputs = both(tmp_path, *gated, size=size)
    seen = observed(OnnxProbe(path), inputs)
    assert [s for s in seen if "hidden" in s] == ["layers.0.hidden", "layers.0.hidden@2", "layers.0.hidden@3"]
    for site in reference.sites:
        if site.layer is not None:
            assert torch.allclose(seen[str(site)].tensor, reference.tensor(site), atol=1e-5), site


def test_calls_that_the_graph_does_not_tell_apart_are_not_mistaken(tmp_path: Path) -> None:
    """The second call does more than the others: the values of the calls are found by what they hold."""
    reference, path, inputs = both(tmp_path, 1)
    with pytest.raises(SourceError, match="does not tell its calls apart"):
        observed(OnnxProbe(path), inputs)
    seen = observed(OnnxProbe(path, reference=reference), inputs)
    for site in reference.sites:
        if site.layer is not None and str(site) in seen:
            assert torch.allclose(seen[str(site)].tensor, reference.tensor(site), atol=1e-5), site
            assert "by value" in seen[str(site)].found
    assert "layers.0.hidden@3" in seen
