"""Pairs of models from transformers, so that nothing can be fitted to this folder's own decoder."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.faults.operators import ten_bits
from tests.faults.pairs import DTYPES, Case, Pair, Setting
from tests.faults.planting import Planted, site_of
from tests.models import MODELS, VOCABULARY, llama

Mutation = Callable[[Any, np.random.Generator], tuple[Planted, ...]]
LAYERS = 6
BUILD: dict[str, Callable[[], Any]] = {
    "llama": lambda: llama(LAYERS),
    "llama-eager": lambda: llama(LAYERS, attn_implementation="eager"),
    "llama-biased": lambda: llama(LAYERS, attention_bias=True),
    **{kind: MODELS[kind] for kind in ("gemma2", "qwen3", "gpt2", "opt", "bert")},
}


def ready(name: str, kind: str, fault: Mutation, setting: Setting | None = None, **change: Any) -> Pair:
    """A pair of the transformers model called `kind`."""
    how = replace(setting or Setting(batch=2), **change)

    def build(seed: int) -> Case:
        draw = np.random.default_rng([zlib.crc32(name.encode()), seed])
        reference = _filled(BUILD[kind](), seed)
        candidate = copy.deepcopy(reference)
        with torch.no_grad():
            truth = fault(candidate, draw)
        if how.precision in DTYPES:
            for parameter in candidate.parameters():
                parameter.data = parameter.data.to(DTYPES[how.precision])
        ids = torch.from_numpy(draw.integers(3, VOCABULARY, (how.batch, how.seq)))
        mask = torch.ones_like(ids)
        if how.padding:
            mask[0, : how.seq // 4] = 0
        options = {"precision": how.declared} if how.declared else {}
        return Case(reference, candidate, {"input_ids": ids, "attention_mask": mask}, truth, options)

    return Pair(name, build)


def _filled(model: Any, seed: int) -> Any:
    """Random biases and gains, which transformers sets to zero and one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                spread = 0.2 if name.endswith("bias") else 0.1
                parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def layers_of(model: Any) -> Any:
    for path in ("model.layers", "transformer.h", "model.decoder.layers", "encoder.layer"):
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError(type(model).__name__)


def drawn(model: Any, draw: np.random.Generator) -> int:
    return int(draw.integers(1, len(layers_of(model))))


def _weights(path: str, part: str, cause: str, change: Callable[[Tensor], Tensor], **known: Any) -> Mutation:
    """The weight at `path` within one layer replaced by `change` of it."""

    def mutate(model: Any, draw: np.random.Generator) -> tuple[Planted, ...]:
        layer = drawn(model, draw)
        weight = layers_of(model)[layer].get_parameter(path)
        weight.copy_(change(weight))
        return (Planted(site_of(layer, part), cause, {"layer": layer, **known}),)

    return mutate


def _attribute(path: str, part: str, cause: str, value: Any, **known: Any) -> Mutation:
    """The attribute at `path` within one layer set to `value`, or to `value` of it."""

    def mutate(model: Any, draw: np.random.Generator) -> tuple[Planted, ...]:
        layer = drawn(model, draw)
        owner, _, name = path.rpartition(".")
        module = layers_of(model)[layer].get_submodule(owner)
        scaled = isinstance(value, tuple)
        setattr(module, name, getattr(module, name) * value[0] if scaled else value)
        return (Planted(site_of(layer, part), cause, {"layer": layer, **known}),)

    return mutate


def _clean(model: Any, draw: np.random.Generator) -> tuple[Planted, ...]:
    return ()


def _eager(model: Any, draw: np.random.Generator) -> tuple[Planted, ...]:
    model.config._attn_implementation = "eager"
    return ()


def rotary_by(cause: str, change: Callable[[Tensor, Tensor], Tensor], **known: Any) -> Mutation:
    """The angles of all layers computed by `change` from positions and inverse frequencies."""

    def mutate(model: Any, draw: np.random.Generator) -> tuple[Planted, ...]:
        rotary = model.get_submodule("model.rotary_emb")

        def forward(x: Tensor, position_ids: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
            angle = change(position_ids[:, :, None].float(), rotary.inv_freq.float()[None, None])
            both = torch.cat((angle, angle), -1)
            return both.cos().to(x.dtype), both.sin().to(x.dtype)

        rotary.forward = forward
        return (Planted("layers.0.key", cause, known),)

    return mutate


def _bf16_angle(position: Tensor, inv_freq: Tensor) -> Tensor:
    return (position.bfloat16() * inv_freq.bfloat16()).float()


def _shifted_angle(position: Tensor, inv_freq: Tensor) -> Tensor:
    return (position + 2) * inv_freq


def _swapped(model: Any, draw: np.random.Generator) -> tuple[Planted, ...]:
    layers = layers_of(model)
    first, second = sorted(int(n) for n in draw.choice(len(layers), 2, replace=False))
    one, two = layers[first], layers[second]
    layers[first], layers[second] = two, one
    one.self_attn.layer_idx, two.self_attn.layer_idx = second, first
    return (Planted(f"layers.{first}.key", "layer_order", {"layer": first, "holds": second}),)


def _kv(model: Any, draw: np.random.Generator) -> tuple[Planted, ...]:
    layer = drawn(model, draw)
    attention = layers_of(model)[layer].self_attn
    key = attention.k_proj.weight.clone()
    attention.k_proj.weight.copy_(attention.v_proj.weight)
    attention.v_proj.weight.copy_(key)
    return (Planted(f"layers.{layer}.key", "kv_swapped", {"layer": layer}),)


def _fused_bias(model: Any, draw: np.random.Generator) -> tuple[Planted, ...]:
    layer = drawn(model, draw)
    bias = layers_of(model)[layer].attn.c_attn.bias
    bias[-bias.shape[0] // 3 :] = 0.0
    return (Planted(f"layers.{layer}.value", "bias_missing", {"layer": layer}),)


def _leak(model: Any, draw: np.random.Generator) -> tuple[Planted, ...]:
    """The written-out mask lets every query see the next token."""
    for layer in layers_of(model):
        attention = layer.self_attn
        attention.forward = _seeing_next(attention.forward)
    return (Planted("layers.0.hidden", "mask_leak", {"ahead": 1}),)


def _seeing_next(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        mask = kwargs["attention_mask"].clone()
        torch.diagonal(mask, 1, -2, -1).zero_()
        return forward(*args, **{**kwargs, "attention_mask": mask})

    return call


def _tf32(model: Any, draw: np.random.Generator) -> tuple[Planted, ...]:
    linears: list[Any] = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for linear in linears:
        linear.forward = _in_tf32(linear)
    return (Planted("layers.0.key", "tf32"),)


def _in_tf32(linear: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(ten_bits(x), ten_bits(linear.weight), linear.bias)


def _int8(weight: Tensor) -> Tensor:
    step = weight.abs().max() / 127
    return (weight / step).round() * step


def _fp8(weight: Tensor) -> Tensor:
    step = weight.abs().max() / 448
    return (weight / step).to(torch.float8_e4m3fn).float() * step


def _heads_turned(model: Any, draw: np.random.Generator) -> tuple[Planted, ...]:
    layer = drawn(model, draw)
    key = layers_of(model)[layer].self_attn.k_proj
    for parameter in key.parameters():
        parameter.copy_(parameter.roll(8, 0))
    return (Planted(f"layers.{layer}.key", "weight_permuted", {"layer": layer, "unit": "head"}),)


PAIRS: tuple[Pair, ...] = (
    ready(
        "llama-value-gain",
        "llama",
        _weights("self_attn.v_proj.weight", "value", "weight_scale", lambda w: w * 1.05, gain=1.05),
        precision="fp16",
    ),
    ready(
        "gpt2-down-gain",
        "gpt2",
        _weights("mlp.c_proj.weight", "hidden", "weight_scale", lambda w: w * 1.2, gain=1.2),
    ),
    ready("opt-key-heads", "opt", _heads_turned),
    ready(
        "bert-value-fp8",
        "bert",
        _weights("attention.self.value.weight", "value", "quant_fp8", _fp8),
        precision="fp16",
    ),
    ready("llama-output-int8", "llama", _weights("self_attn.o_proj.weight", "hidden", "quant_int8", _int8)),
    ready(
        "qwen3-value-bf16-weights",
        "qwen3",
        _weights("self_attn.v_proj.weight", "value", "weight_precision", lambda w: w.bfloat16().float()),
    ),
    ready(
        "gemma2-keys-zero",
        "gemma2",
        _weights("self_attn.k_proj.weight", "key", "weights_collapsed", torch.zeros_like),
    ),
    ready(
        "llama-bias",
        "llama-biased",
        _weights("self_attn.k_proj.bias", "key", "bias_missing", torch.zeros_like),
    ),
    ready("gpt2-bias-fused", "gpt2", _fused_bias, precision="fp16"),
    ready(
        "gemma2-offset", "gemma2", _weights("input_layernorm.weight", "key", "norm_offset", lambda w: w - 1.0)
    ),
    ready(
        "qwen3-eps",
        "qwen3",
        _attribute("input_layernorm.variance_epsilon", "key", "norm_eps", 1e-3, eps=1e-3),
    ),
    ready(
        "llama-scale",
        "llama",
        _attribute("self_attn.scaling", "hidden", "attention_scale", (8**0.5,), ratio=8**0.5),
    ),
    ready("gpt2-relu", "gpt2", _attribute("mlp.act", "hidden", "activation", nn.ReLU(), activation="relu")),
    ready("llama-kv", "llama", _kv, precision="bf16"),
    ready("llama-order", "llama", _swapped),
    ready(
        "llama-rope-bf16", "llama-eager", rotary_by("rope_precision", _bf16_angle, precision="bf16"), seq=96
    ),
    ready("qwen3-rope-shift", "qwen3", rotary_by("rope_position", _shifted_angle, shift=2), precision="fp16"),
    ready("llama-leak", "llama-eager", _leak),
    ready("llama-tf32", "llama", _tf32),
    ready("clean-llama-eager-padded", "llama", _eager, padding="left"),
    ready("clean-gemma2-bf16", "gemma2", _clean, precision="bf16"),
    ready("clean-gpt2-fp16", "gpt2", _clean, precision="fp16"),
    ready("clean-qwen3-fp16-padded", "qwen3", _clean, precision="fp16", padding="left"),
)
