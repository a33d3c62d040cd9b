"""A fused projection whose heads each have their query, key and value side by side is taken apart rightly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from divergence import compare
from divergence.config import Config

HEADS, DIM, HIDDEN = 4, 16, 64


def spread(model: Any) -> Any:
    """Weights and biases at random, none of them zero or one."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + ("norm" in name))
    return model.eval()


def neox() -> Any:
    config = GPTNeoXConfig(
        vocab_size=61,
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        intermediate_size=96,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
    )
    return spread(GPTNeoXForCausalLM(config))


def bloom() -> Any:
    return spread(BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=HIDDEN, n_layer=3, n_head=HEADS)))


def phi3() -> Any:
    config = Phi3Config(
        vocab_size=61,
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        intermediate_size=96,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return spread(Phi3ForCausalLM(config))


def by_head(part: int, change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    """Changes the query (0), key (1) or value (2) of every head, in weight and bias."""

    def fault(projection: Any) -> None:
        for parameter in (projection.weight, projection.bias):
            rows = parameter.view(HEADS, 3, DIM, -1)
            rows[:, part] = change(rows[:, part].clone())

    return fault


def exchanged(projection: Any) -> None:
    for parameter in (projection.weight, projection.bias):
        rows = parameter.view(HEADS, 3, DIM, -1)
        rows[:, [1, 2]] = rows[:, [2, 1]].clone()


def whole(projection: Any) -> None:
    """All queries, then all keys, then all values."""
    for parameter in (projection.weight, projection.bias):
        rows = parameter.view(HEADS, 3, DIM, -1).transpose(0, 1)
        parameter.copy_(rows.reshape(parameter.shape).clone())


def in_blocks(projection: Any) -> None:
    """Key and value of a projection whose last 32 + 32 rows they are."""
    weight = projection.weight.clone()
    projection.weight[64:96], projection.weight[96:] = weight[96:], weight[64:96]


def without_bias_of_value(projection: Any) -> None:
    projection.bias.view(HEADS, 3, DIM)[:, 2] = 0


@pytest.mark.parametrize(
    ("make", "path", "fault", "site", "cause"),
    [
        (neox, "attention.query_key_value", without_bias_of_value, "value", "bias_missing"),
        (bloom, "self_attention.query_key_value", without_bias_of_value, "value", "bias_missing"),
        (neox, "attention.query_key_value", by_head(2, lambda w: w * 1.2), "value", "weight_scale"),
        (bloom, "self_attention.query_key_value", by_head(1, lambda w: w * 1.2), "key", "weight_scale"),
        (neox, "attention.query_key_value", exchanged, "key", "kv_swapped"),
        (bloom, "self_attention.query_key_value", whole, "key", "weight_permuted"),
        (phi3, "self_attn.qkv_proj", in_blocks, "key", "kv_swapped"),
    ],
)
def test_faults_of_its_parts_are_named(
    make: Callable[[], Any], path: str, fault: Callable[[Any], None], site: str, cause: str
) -> None:
    reference = make()
    wrong = copy.deepcopy(reference)
    layers = next(m for m in wrong.modules() if isinstance(m, torch.nn.ModuleList))
    with torch.no_grad():
        fault(layers[1].get_submodule(path))
    ids = torch.randint(0, 61, (1, 24), generator=torch.Generator().manual_seed(2))
    result = compare(reference, wrong, {"input_ids": ids}, config=Config())
    assert result.first_divergence is not None and result.first_divergence.site == f"layers.1.{site}"
    first = result.causes[0]
    assert (first.id, first.site) == (cause, f"layers.1.{site}")
    assert first.explained is not None and first.explained > 0.9
