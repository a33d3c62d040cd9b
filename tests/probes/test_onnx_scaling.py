"""Keys that the model's own code scales on their way to the attention product."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from divergence.captures import Capture
from divergence.pipeline import record
from divergence.probes import silent
from divergence.probes.onnx import OnnxProbe
from divergence.probes.pytorch import PyTorchProbe
from tests.exports import exported, laid_out, observed

pytestmark = pytest.mark.filterwarnings("ignore")

HEADS, WIDTH = 2, 8


class Attention(nn.Module):
    """Scales the query and the key before their product."""

    def __init__(self, query: float, key: float, *, folded: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.scales, self.folded = (query, key), folded

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in
                   (self.q_proj, self.k_proj, self.v_proj))  # fmt: skip
        if self.folded:
            q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
        if self.scales[0] != 1:
            q = q * self.scales[0]
        if self.scales[1] != 1:
            k = k * self.scales[1]
        mixed = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        out: Tensor = self.o_proj(
            mixed.view(x.shape[0], HEADS, -1, WIDTH // HEADS).transpose(1, 2).flatten(2)
        )
        return out


class Layer(nn.Module):
    """An attention and its residual."""

    def __init__(self, query: float, key: float, *, folded: bool) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention(query, key, folded=folded)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.attention(self.norm(x))
        return out


class Stack(nn.Module):
    """Three layers with the scales of query and key that are given."""

    def __init__(self, *scales: tuple[float, float], folded: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList([Layer(*both, folded=folded) for both in scales])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


INPUTS = {"x": torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))}


def keys(reference: nn.Module, candidate: nn.Module, folder: Path) -> list[tuple[Tensor, Tensor]]:
    """The keys of the reference, and those of the candidate's export, by layer."""
    held: Capture = record(
        PyTorchProbe(reference.eval()), INPUTS, folder / "ref.capture", detail=False, progress=silent
    )
    path = exported(candidate.eval(), INPUTS, folder / "model.onnx")
    seen = observed(OnnxProbe(path, reference=held), INPUTS)
    sites = [site for site in held.sites if site.tensor == "key"]
    return [(held.tensor(site), laid_out(seen[str(site)])) for site in sites]


@pytest.mark.parametrize("folded", [False, True])
def test_a_key_that_the_code_scales_is_taken_as_it_reaches_the_product(folded: bool, tmp_path: Path) -> None:
    scales = [(1.0, 0.2)] * 3
    found = keys(Stack(*scales, folded=folded), Stack(*scales, folded=folded), tmp_path)
    assert len(found) == 3
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in found)


def test_other_code_may_scale_the_key_to_the_same_end(tmp_path: Path) -> None:
    found = keys(Stack(*[(0.25, 1.0)] * 3), Stack(*[(0.5, 0.5)] * 3), tmp_path)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in found)


def test_a_wrong_scale_of_one_layer_shows(tmp_path: Path) -> None:
    found = keys(Stack(*[(0.5, 1.0)] * 3), Stack((0.5, 1.0), (0.5, 1.5), (0.5, 1.0)), tmp_path)
    assert torch.allclose(*found[0], atol=1e-5)
    assert torch.allclose(found[1][0] * 1.5, found[1][1], atol=1e-5)


def test_a_wrong_scale_of_every_layer_shows(tmp_path: Path) -> None:
    found = keys(Stack(*[(0.5, 0.2)] * 3), Stack(*[(0.5, 0.4)] * 3), tmp_path)
    assert torch.allclose(found[0][0] * 2, found[0][1], atol=1e-5)
