"""Pairs of what ports and deployments do: few bits in products and caches, scaled rotary embeddings, windows,
parts in another precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.faults.pairs import Pair
from tests.faults.planting import Planted
from tests.faults.ready import Mutation, drawn, layers_of, ready, rotary_by
from tests.fewer_bits import Change, floats, in_half, integers, round_products

if TYPE_CHECKING:
    import numpy as np


def _products(cause: str, inputs: Change, weights: Change, **known: Any) -> Mutation:
    """Every linear layer of the stack on rounded inputs and weights."""

    def mutate(model: Any, draw: np.random.Generator) -> tuple[Planted, ...]:
        for layer in layers_of(model):
            for module in layer.modules():
                round_products(module, inputs, weights)
        return (Planted("layers.0.key", cause, known),)

    return mutate


def _attention(name: str, cause: str, site: str, change: Callable[..., tuple[Tensor, ...]]) -> Mutation:
    """Another attention function: `change` of query, key, value and the boolean mask of what is seen."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        query, key, value, seen = change(query, key, value, seen)
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        made = F.scaled_dot_product_attention(query, key, value, seen, scale=kwargs["scaling"])
        return made.transpose(1, 2), None

    def mutate(model: Any, draw: np.random.Generator) -> tuple[Planted, ...]:
        ALL_ATTENTION_FUNCTIONS.register(name, attend)
        model.config._attn_implementation = name
        return (Planted(site, cause),)

    return mutate


def _rounded(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
    rounded = floats((3,))
    return query, rounded(key), rounded(value), seen


def _tiled(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
    groups = query.shape[1] // key.shape[1]
    return query, key.repeat(1, groups, 1, 1), value.repeat(1, groups, 1, 1), seen


def _window(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
    return query, key, value, seen & ~seen.tril(-9)


def _llama3(position: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotary frequencies as Llama 3 scales them, by 8 from 16 tokens on."""
    waves = 2 * math.pi / inv_freq
    smooth = ((16 / waves - 1) / 3).clamp(0, 1)
    return position * ((1 - smooth) * inv_freq / 8 + smooth * inv_freq)


def _fresh_norm(model: Any, draw: np.random.Generator) -> tuple[Planted, ...]:
    layer = drawn(model, draw)
    layers_of(model)[layer].input_layernorm.weight.fill_(1.0)
    return (Planted(f"layers.{layer}.key", "weights_collapsed", {"layer": layer}),)


def _rounded_embedding(model: Any, draw: np.random.Generator) -> tuple[Planted, ...]:
    weight = model.get_input_embeddings().weight
    weight.copy_(weight.bfloat16())
    return (Planted("layers.0.key", "weight_precision", {"precision": "bf16"}),)


def _half_parts(*paths: str) -> Mutation:
    """Modules that compute in bf16 between others in fp32: nothing is wrong with them."""

    def mutate(model: Any, draw: np.random.Generator) -> tuple[Planted, ...]:
        for path in paths:
            in_half(model.get_submodule(path))
        return ()

    return mutate


def _beside_halves(model: Any, draw: np.random.Generator) -> tuple[Planted, ...]:
    """Half a per cent on a value, which only a model that is all in bf16 may be off by."""
    _half_parts("model.norm")(model, draw)
    layer = drawn(model, draw)
    layers_of(model)[layer].self_attn.v_proj.weight.mul_(1.005)
    return (Planted(f"layers.{layer}.value", "weight_scale", {"layer": layer, "gain": 1.005}),)


def _percentile(model: Any, draw: np.random.Generator) -> tuple[Planted, ...]:
    """A weight in int8 with a step for every output channel that leaves a hundredth of the values out."""
    layer = drawn(model, draw)
    weight = layers_of(model)[layer].self_attn.v_proj.weight
    step = weight.abs().quantile(0.99, 1, keepdim=True) / 127
    weight.copy_((weight / step).round().clamp(-127, 127) * step)
    return (Planted(f"layers.{layer}.value", "quant_int8", {"layer": layer}),)


def _mixed_inputs(model: Any, draw: np.random.Generator) -> tuple[Planted, ...]:
    """The inputs of a projection of the MLP in an order of no kind."""
    layer = drawn(model, draw)
    weight = layers_of(model)[layer].mlp.down_proj.weight
    weight.copy_(weight[:, torch.from_numpy(draw.permutation(weight.shape[1]))])
    return (Planted(f"layers.{layer}.hidden", "weight_permuted", {"layer": layer}),)


def _whole_tensors(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
    rounded = integers((0, 1, 2, 3))
    return query, rounded(key), rounded(value), seen


PAIRS: tuple[Pair, ...] = (
    ready("llama-int8-percentile", "llama", _percentile),
    ready("qwen3-inputs-mixed", "qwen3", _mixed_inputs),
    ready(
        "llama-kernel-int8",
        "llama",
        _attention("int8-kernel", "quant_int8", "layers.0.hidden", _whole_tensors),
    ),
    ready("llama-w8a8", "llama", _products("quant_int8", integers((0, 1, 2)), integers((1,)))),
    ready(
        "llama-w8a8-token", "llama", _products("quant_int8", integers((2,)), integers((1,))), precision="fp16"
    ),
    ready("qwen3-fp8", "qwen3", _products("quant_fp8", floats((0, 1, 2)), floats((0, 1)))),
    ready("llama-kernel-fp8", "llama", _attention("fp8-kernel", "quant_fp8", "layers.0.hidden", _rounded)),
    ready("llama-tiled", "llama", _attention("tiled", "weight_permuted", "layers.0.hidden", _tiled)),
    ready("llama-window", "llama", _attention("window", "mask_leak", "layers.0.hidden", _window), seq=40),
    ready("llama-rope-scaled", "llama", rotary_by("rope_position", _llama3), seq=64),
    ready("gemma2-norm-fresh", "gemma2", _fresh_norm),
    ready("qwen3-embedding-bf16", "qwen3", _rounded_embedding),
    ready("llama-beside-halves", "llama", _beside_halves),
    ready("clean-half-embedding", "llama", _half_parts("model.embed_tokens")),
    ready("clean-half-layers", "llama", _half_parts("model.layers.1", "model.layers.4", "lm_head")),
)
