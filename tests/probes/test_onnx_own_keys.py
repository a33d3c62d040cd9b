"""Keys and values that a graph hands out take precedence where they differ from those inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from divergence.captures import Capture
from divergence.pipeline import record
from divergence.probes import Observation, RunFacts, silent
from divergence.probes.onnx import OnnxProbe
from divergence.probes.pytorch import PyTorchProbe
from tests.exports import laid_out
from tests.smollm2 import quiet

pytestmark = pytest.mark.filterwarnings("ignore")

Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
INPUTS = {"x": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))}


class Layer(nn.Module):
    """An attention that hands out its key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = self.norm(x)
        q, k, v = (p(n).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v
        return x + self.out(mixed.transpose(1, 2).flatten(2)), k, v


class Stacking(nn.Module):
    """Returns the keys and values of its three layers, in two outputs of these names."""

    def __init__(self, names: tuple[str, str], change: Change = lambda k, v: (k, v)) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList([Layer() for _ in range(3)])
        self.names, self.change = names, change

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        held = []
        for layer in self.layers:
            x, key, value = layer(x)
            held.append((key, value))
        stacked = self.change(*(torch.stack(parts, 1) for parts in zip(*held, strict=True)))
        return {"logits": x, **dict(zip(self.names, stacked, strict=True))}


def run(
    folder: Path, reference: nn.Module, candidate: Any
) -> tuple[Capture, dict[str, Observation], RunFacts]:
    """What the reference held, and the last that the candidate's export handed over for every site."""
    held = record(
        PyTorchProbe(reference.eval()), INPUTS, folder / "ref.capture", detail=False, progress=silent
    )
    path = folder / "m.onnx"
    with quiet():
        torch.onnx.export(candidate.eval(), tuple(INPUTS.values()), str(path), dynamo=True, input_names=["x"],
                          output_names=["logits", *candidate.names], verbose=False)  # fmt: skip
    seen: dict[str, Observation] = {}
    facts = OnnxProbe(path, reference=held).run(INPUTS, lambda o: seen.__setitem__(str(o.site), o))
    return held, seen, facts


@pytest.mark.parametrize("names", [("keys", "values"), ("k_all", "v_all")])
def test_what_is_handed_out_is_compared_where_it_differs(names: tuple[str, str], tmp_path: Path) -> None:
    held, seen, facts = run(tmp_path, Stacking(names), Stacking(names, lambda k, v: (v, k)))
    for site in held.sites:
        if site.tensor in ("key", "value"):
            other = held.tensor(site.with_tensor("value" if site.tensor == "key" else "key"))
            assert torch.allclose(laid_out(seen[str(site)]), other, atol=1e-5), site
            assert names[0 if site.tensor == "key" else 1] in seen[str(site)].found
    assert sum("of 3 layers is taken from" in note for note in facts.notes) == 2


def test_one_stale_layer_alone_is_taken(tmp_path: Path) -> None:
    def stale(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([keys[:, :1], keys[:, 1:2].roll(1, 3), keys[:, 2:]], 1), values

    names = ("keys", "values")
    held, seen, facts = run(tmp_path, Stacking(names), Stacking(names, stale))
    keys = [site for site in held.sites if site.tensor == "key"]
    equal = [torch.allclose(laid_out(seen[str(site)]), held.tensor(site), atol=1e-5) for site in keys]
    assert equal == [True, False, True]
    assert any("the key of 1 layer" in note for note in facts.notes)


@pytest.mark.parametrize("names", [("keys", "values"), ("k_all", "v_all")])
def test_a_right_export_is_read_from_inside(names: tuple[str, str], tmp_path: Path) -> None:
    _, seen, facts = run(tmp_path, Stacking(names), Stacking(names))
    assert not any("taken from" in note for note in facts.notes)
    assert all("metadata" in found.found for site, found in seen.items() if site.startswith("layers."))


def test_outputs_that_the_reference_has_for_something_else_are_not_taken(tmp_path: Path) -> None:
    """As a cache of keys before their rotation is."""
    names = ("k_all", "v_all")
    model = Stacking(names, lambda k, v: (k.flip(-1), v))
    held, seen, facts = run(tmp_path, model, Stacking(names, lambda k, v: (k.flip(-1) * 2, v)))
    for site in held.sites:
        if site.layer is not None:
            assert torch.allclose(laid_out(seen[str(site)]), held.tensor(site), atol=1e-5), site
    assert not any("taken from" in note for note in facts.notes)
