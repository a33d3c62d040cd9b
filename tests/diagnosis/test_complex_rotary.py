"""A rotary embedding that multiplies complex numbers is understood like one of cosines and sines."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from divergence import compare
from divergence.config import Config
from divergence.diagnosis import rotary
from divergence.diagnosis.case import Case

HIDDEN, HEADS, DIM = 64, 4, 16


class Layer(nn.Module):
    """Attention whose queries and keys are turned by `rotation` `[token, DIM / 2]`, complex."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4)
        )
        self.layout = "pairs"

    def turned(self, x: Tensor, rotation: Tensor) -> Tensor:
        pairs = x.float().unflatten(-1, (-1, 2) if self.layout == "pairs" else (2, -1))
        pairs = pairs if self.layout == "pairs" else pairs.transpose(-1, -2)
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * rotation)
        return (turned if self.layout == "pairs" else turned.transpose(-1, -2)).flatten(-2).to(x.dtype)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (
            projection(normed).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = self.turned(query, rotation), self.turned(key, rotation)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: Tensor = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        return result


class Model(nn.Module):
    """Three layers; `angle` makes the angles of positions and inverse frequencies."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.angle: Callable[[Tensor, Tensor], Tensor] = lambda p, f: p * f

    def forward(self, x: Tensor) -> Tensor:
        inverse = 10_000.0 ** -(torch.arange(0, DIM, 2) / DIM)
        angle = self.angle(torch.arange(x.shape[1]).float()[:, None], inverse).float()
        rotation = torch.polar(torch.ones_like(angle), angle)
        for layer in self.layers:
            x = layer(x, rotation)
        return x


def given() -> dict[str, Tensor]:
    return {"x": torch.randn(1, 40, HIDDEN, generator=torch.Generator().manual_seed(1))}


def shifted(model: Model) -> None:
    model.angle = lambda p, f: (p + 3) * f


def rounded(model: Model) -> None:
    model.angle = lambda p, f: (p * f).bfloat16()


def halves(model: Model) -> None:
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.layout = "halves"


@pytest.mark.parametrize(
    ("fault", "cause", "parameters"),
    [
        (shifted, "rope_position", {"offset": 3}),
        (rounded, "rope_precision", {}),
        (halves, "rope_layout", {"layout": "halves"}),
    ],
)
def test_faults_of_it_are_named(
    fault: Callable[[Model], None], cause: str, parameters: dict[str, Any]
) -> None:
    wrong = copy.deepcopy(reference := Model())
    fault(wrong)
    result = compare(reference, wrong, given(), config=Config())
    assert result.first_divergence is not None and result.first_divergence.site == "layers.0.key"
    assert [(c.id, c.site) for c in result.causes] == [(cause, "layers.0.key")]
    assert result.causes[0].explained is not None and result.causes[0].explained > 0.999
    assert parameters.items() <= result.causes[0].parameters.items()


def test_its_angles_are_read_back_and_putting_them_in_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[rotary.Rotary, Case]] = []
    find = rotary.find

    def noted(case: Case) -> rotary.Rotary | None:
        found = find(case)
        if found is not None:
            seen.append((found, case))
        return found

    monkeypatch.setattr(rotary, "find", noted)
    wrong = copy.deepcopy(reference := Model())
    shifted(wrong)
    compare(reference, wrong, given(), config=Config())
    found, case = seen[0]
    assert {part for part, _, _ in found.uses.values()} == {"both"}
    assert torch.equal(found.positions, torch.arange(40.0, dtype=torch.float64)[None])
    clean = case.clean["key"]
    for fault in (
        found.with_angles(found.angles(found.positions, found.frequencies)),
        found.with_layout("pairs"),
    ):
        with torch.inference_mode():
            same = case.unit.run([fault])["key"]
        assert float((same - clean).norm() / clean.norm()) < 1e-5
        assert not torch.equal(same, clean)  # it was put in
