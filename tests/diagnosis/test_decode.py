"""One token and a cache: what a step of generation shows is enough to name what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.diagnosis.faults import diagnosed, planted, rotary
from tests.models import VOCABULARY, llama

LAYERS, PAST = 5, 40
SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}


class Step(nn.Module):
    """The model on the next tokens, given the keys and values of those before, `[layer, batch, head, token,
    channel]`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            cache.update(key.clone(), value.clone(), layer)
        logits: Tensor = self.model(
            input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True
        ).logits
        return logits


class Spoilt(Step):
    """What it is given is `change`d first."""

    def __init__(self, model: nn.Module, change: Callable[[Tensor], None]) -> None:
        super().__init__(model)
        self.change = change

    def forward(self, input_ids: Tensor, position_ids: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys, values = keys.clone(), values.clone()
        self.change(keys)
        return super().forward(input_ids, position_ids, keys, values)


def given(model: Any, tokens: int = 1) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (1, PAST + tokens), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        cache = model(input_ids=ids[:, :PAST], use_cache=True).past_key_values.layers
    return {
        "input_ids": ids[:, PAST:],
        "position_ids": torch.arange(PAST, PAST + tokens)[None],
        "keys": torch.stack([layer.keys for layer in cache]).clone(),
        "values": torch.stack([layer.values for layer in cache]).clone(),
    }


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("offset", [1, -7, 600])
def test_positions_are_named(tokens: int, offset: int) -> None:
    model = llama(LAYERS, **SIZES)
    moved = planted(model, rotary(lambda position, inv_freq: (position + offset) * inv_freq))
    result = diagnosed(Step(model), Step(moved), given(model, tokens))
    assert [(c.id, c.site) for c in result.causes] == [("rope_position", "layers.0.key")]
    assert result.causes[0].parameters["offset"] == offset


def test_the_precision_of_angles_is_named() -> None:
    model = llama(LAYERS, **SIZES)
    rounded = planted(model, rotary(lambda p, f: (p * f.bfloat16().float()).bfloat16().float()))
    result = diagnosed(Step(model), Step(rounded), given(model))
    assert [(c.id, c.site) for c in result.causes] == [("rope_precision", "layers.0.key")]
    assert result.causes[0].explained is not None
    assert result.causes[0].explained > 0.999


def test_another_base_is_estimated() -> None:
    model = llama(LAYERS, **SIZES)
    other = planted(model, rotary(lambda position, inv_freq: position * inv_freq**1.1))
    result = diagnosed(Step(model), Step(other), given(model))
    assert [(c.id, c.site) for c in result.causes] == [("rope_position", "layers.0.key")]
    assert result.causes[0].parameters["base"] == pytest.approx(10_000.0**1.1, rel=1e-2)


@pytest.mark.parametrize(
    ("change", "said", "tokens"),
    [
        (lambda keys: keys[2, :, :, -1].zero_(), "zeros at token 39", [39]),
        (lambda keys: keys[2, :, :, 5:8].zero_(), "zeros at tokens 5 to 7", [5, 6, 7]),
        (
            lambda keys: keys[2, :, :, 1:].copy_(keys[2, :, :, :-1].clone()),
            "what belongs to the token before at tokens 1 to 39",
            [*range(1, PAST)],
        ),
        (
            lambda keys: keys[2, :, :, ::20].copy_(keys[1, :, :, ::20]),
            "something else at 2 tokens from 0 to 20",
            [0, 20],
        ),
    ],
)
def test_a_cache_that_is_handed_on_wrong_is_named(
    change: Callable[[Tensor], None], said: str, tokens: list[int]
) -> None:
    model = llama(LAYERS, **SIZES)
    result = diagnosed(Step(model), Spoilt(llama(LAYERS, **SIZES), change), given(model))
    (found,) = result.causes
    assert (found.id, found.site) == ("stale_kv", "layers.2.key")
    assert found.title == f"the cache that the layer is given holds {said}"
    assert found.parameters["tokens"] == tokens
    assert any("from token 40 on, and these tokens are right" in sentence for sentence in found.evidence)


def test_a_projection_that_is_wrong_in_this_call_is_no_stale_cache() -> None:
    model = llama(LAYERS, **SIZES)

    def gain(model: Any) -> None:
        model.model.layers[2].self_attn.k_proj.weight *= 1.05

    result = diagnosed(Step(model), Step(planted(model, gain)), given(model))
    assert [(c.id, c.site) for c in result.causes] == [("weight_scale", "layers.2.key")]
