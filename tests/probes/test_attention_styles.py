"""Keys and values of attention, however it is written: grouped, by einsum, its softmax by hand, in blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from divergence.probes.pytorch import PyTorchProbe
from tests.exports import observed

BATCH, TOKENS, SIZE, HEADS, GROUPS = 2, 9, 8, 4, 2
EACH = HEADS // GROUPS
SCALE = 1 / math.sqrt(SIZE)

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From query `[batch, head, token, channel]`, key and value `[batch, group, token, channel]` and an additive
mask `[token, token]` to `[batch, head, token, channel]`."""


def repeated(key: Tensor) -> Tensor:
    return key.repeat_interleave(EACH, 1)


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = query @ repeated(key).transpose(-1, -2) * SCALE + mask
    made: Tensor = scores.softmax(-1) @ repeated(value)
    return made


def grouped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = query.unflatten(1, (GROUPS, EACH)) @ key[:, :, None].transpose(-1, -2) * SCALE + mask
    made: Tensor = (scores.softmax(-1) @ value[:, :, None]).flatten(1, 2)
    return made


def expanded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    key, value = (t[:, :, None].expand(-1, -1, EACH, -1, -1) for t in (key, value))
    scores = query.unflatten(1, (GROUPS, EACH)) @ key.transpose(-1, -2) * SCALE + mask
    made: Tensor = (scores.softmax(-1) @ value).flatten(1, 2)
    return made


def einsum(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("bgrtd,bgsd->bgrts", query.unflatten(1, (GROUPS, EACH)), key) * SCALE + mask
    made: Tensor = torch.einsum("bgrts,bgsd->bgrtd", scores.softmax(-1), value).flatten(1, 2)
    return made


def einsum_by_token(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    query = query.transpose(1, 2).unflatten(2, (GROUPS, EACH))
    scores = torch.einsum("btgrd,bsgd->bgrts", query, key.transpose(1, 2)) * SCALE + mask
    made = torch.einsum("bgrts,bsgd->btgrd", scores.softmax(-1), value.transpose(1, 2))
    return made.flatten(2, 3).transpose(1, 2)


def queries_folded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """The queries of a group lie one after another in one axis."""
    rows = query.unflatten(1, (GROUPS, EACH)).flatten(2, 3)
    scores = (rows @ key.transpose(-1, -2)).unflatten(2, (EACH, TOKENS)) * SCALE + mask
    made = scores.softmax(-1).flatten(2, 3) @ value
    heads: Tensor = made.unflatten(2, (EACH, TOKENS)).flatten(1, 2)
    return heads


def by_hand(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = query @ repeated(key).transpose(-1, -2) * SCALE + mask
    raised = (scores - scores.amax(-1, keepdim=True)).exp()
    return raised / raised.sum(-1, keepdim=True) @ repeated(value)


def divided_last(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = query @ repeated(key).transpose(-1, -2) * SCALE + mask
    raised = torch.exp(scores - scores.amax(-1, keepdim=True))
    return raised @ repeated(value) / raised.sum(-1, keepdim=True)


def in_blocks(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    key, value, half = repeated(key), repeated(value), TOKENS // 2
    return torch.cat(
        [
            (query[:, :, rows] @ key.transpose(-1, -2) * SCALE + mask[rows]).softmax(-1) @ value
            for rows in (slice(0, half), slice(half, None))
        ],
        2,
    )


def blocks_of_keys(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """As flash attention goes over keys: the largest score and the sum are carried along."""
    key, value = repeated(key), repeated(value)
    largest = torch.full((BATCH, HEADS, TOKENS, 1), -torch.inf)
    total, made = torch.zeros_like(largest), torch.zeros_like(query)
    for columns in (slice(0, 4), slice(4, None)):
        scores = query @ key[:, :, columns].transpose(-1, -2) * SCALE + mask[:, columns]
        top = torch.maximum(largest, scores.amax(-1, keepdim=True))
        raised, before = (scores - top).exp(), (largest - top).exp()
        total = total * before + raised.sum(-1, keepdim=True)
        made, largest = made * before + raised @ value[:, :, columns], top
    return made / total


def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


STYLES: dict[str, Attend] = {
    f.__name__: f
    for f in (
        plain,
        grouped,
        expanded,
        einsum,
        einsum_by_token,
        queries_folded,
        by_hand,
        divided_last,
        in_blocks,
        fused,
    )
}


class Layer(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        width = HEADS * SIZE
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.both = nn.Linear(width, 2 * GROUPS * SIZE)
        self.attend = attend

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self.both(x).unflatten(-1, (2 * GROUPS, SIZE)).transpose(1, 2).chunk(2, 1)
        return key * 1.5, value  # not what the projection gave

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
        mask = torch.full((TOKENS, TOKENS), -1e9).triu(1)
        made: Tensor = self.out(self.attend(query, *self.split(x), mask).transpose(1, 2).flatten(2))
        return x + made


class Model(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(attend) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def made(style: str) -> Any:
    torch.manual_seed(0)
    return Model(STYLES[style]).eval()


def test_blocks_of_keys_are_not_taken_for_all_of_them() -> None:
    """The projections are what is left to look at."""
    torch.manual_seed(0)
    model = Model(blocks_of_keys).eval()
    x = torch.randn(BATCH, TOKENS, HEADS * SIZE, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x), made("plain")(x))
    seen = observed(PyTorchProbe(model), {"x": x})
    assert sorted(seen) == ["layers.0.hidden", "layers.1.hidden", "output.0"]


@pytest.mark.parametrize("style", STYLES)
def test_keys_and_values_are_seen(style: str) -> None:
    model = made(style)
    inputs = {"x": torch.randn(BATCH, TOKENS, HEADS * SIZE, generator=torch.Generator().manual_seed(1))}
    seen = observed(PyTorchProbe(model), inputs)
    expected = [f"layers.{i}.{t}" for i in range(2) for t in ("key", "value", "hidden")]
    assert sorted(seen) == sorted([*expected, "output.0"])
    x = inputs["x"]
    for index, layer in enumerate(model.layers):
        key, value = layer.split(x)
        torch.testing.assert_close(seen[f"layers.{index}.key"].tensor, key)
        torch.testing.assert_close(seen[f"layers.{index}.value"].tensor, value)
        x = layer(x)
        torch.testing.assert_close(seen[f"layers.{index}.hidden"].tensor, x)
