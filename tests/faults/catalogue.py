"""The pairs of this folder's own decoders, by what is wrong with them."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.faults import plant
from tests.faults import plant_weights as weights
from tests.faults.operators import Shape
from tests.faults.pairs import Pair, Setting, pair

LLAMA = Shape()
GEMMA = Shape(style="gemma", head_dim=32)
GPT2 = Shape(style="gpt2")
PADDED = Setting(padding="left", batch=2)
HALF = Setting(precision="fp16")


def _weights() -> list[Pair]:
    sdpa = replace(LLAMA, attention="sdpa")
    return [
        pair("value-gain", replace(LLAMA, layers=12, outputs="stacked"), weights.gain("value", 1.02)),
        pair("key-gain-fp16", replace(sdpa, layers=8), weights.gain("key", 1.05), HALF),
        pair("output-gain-bf16", replace(GEMMA, layers=6), weights.gain("output", 1.5), precision="bf16"),
        pair(
            "down-gain-padded", replace(GPT2, layers=8, attention="sdpa"), weights.gain("down", 0.9), PADDED
        ),
        pair("value-heads", replace(LLAMA, kv_heads=4, outputs="all"), weights.permuted("value", "head")),
        pair("key-heads-fused", replace(GPT2, layers=10), weights.permuted("key", "head"), HALF),
        pair("value-channels", replace(GEMMA, attention="sdpa"), weights.permuted("value", "channel")),
        pair("key-bias", replace(sdpa, bias=True), weights.no_bias("key")),
        pair("value-bias-fused-fp16", GPT2, weights.no_bias("value", "all"), HALF),
        pair("output-bias", replace(GPT2, attention="sdpa"), weights.no_bias("output")),
        pair("kv-weights", LLAMA, weights.swapped_weights(), precision="bf16"),
        pair("kv-outputs", replace(LLAMA, outputs="stacked"), plant.swapped_outputs(), opaque="outputs"),
        pair("layers-swapped", replace(LLAMA, layers=24, attention="sdpa"), weights.layers_swapped),
        pair("layers-swapped-fp16", replace(GPT2, layers=12), weights.layers_swapped, HALF),
        pair("keys-zero", replace(LLAMA, layers=18, outputs="stacked"), weights.collapsed("key")),
        pair("values-constant", replace(GEMMA, layers=8), weights.collapsed("value", value=0.02), HALF),
    ]


def _quantised() -> list[Pair]:
    sdpa = replace(LLAMA, attention="sdpa", hidden=128, inner=256)
    return [
        pair("int8-tensor", sdpa, weights.int8("value", per_tensor=True)),
        pair("int8-rows-all", replace(sdpa, layers=8), weights.int8("key", "all", per_tensor=False)),
        pair("int8-key-fp16", GEMMA, weights.int8("key", per_tensor=True), HALF),
        pair("int8-down", GEMMA, weights.int8("down", per_tensor=True)),
        pair("fp8-value-fp16", sdpa, weights.fp8("value"), HALF),
        pair("fp8-all", replace(GPT2, layers=8), weights.fp8("key", "all")),
        pair("bf16-weights", replace(sdpa, outputs="stacked"), weights.rounded_weights("key", "bf16", "all")),
        pair("fp16-weights-one", GPT2, weights.rounded_weights("value", "fp16")),
        pair("misread-weights", sdpa, weights.misread_weights("value", torch.bfloat16, torch.float16)),
        pair(
            "misread-cache",
            replace(LLAMA, outputs="stacked"),
            plant.misread(torch.bfloat16, torch.float16),
            opaque="outputs",
        ),
        pair(
            "accumulate-fp16",
            replace(sdpa, hidden=512, layers=4),
            plant.arithmetic("accumulation_precision", "fp16"),
            HALF,
            seq=48,
        ),
        pair("accumulate-bf16", GEMMA, plant.arithmetic("accumulation_precision", "bf16", 16)),
        pair("tf32", replace(sdpa, layers=8), plant.arithmetic("tf32", "tf32")),
        pair("tf32-padded", replace(GPT2, attention="sdpa"), plant.arithmetic("tf32", "tf32"), PADDED),
    ]


def _operators() -> list[Pair]:
    quiet = replace(LLAMA, scale=0.02)
    return [
        pair("eps", replace(quiet, attention="sdpa"), plant.eps(1e-6)),
        pair("eps-gpt2-fp16", replace(GPT2, scale=0.05, layers=8), plant.eps(1e-3), HALF),
        pair("eps-second", quiet, plant.eps(1e-3, norm=2, where=None)),
        pair("offset-missing", replace(GEMMA, layers=8, outputs="stacked"), plant.offset(0.0)),
        pair("offset-added", replace(LLAMA, attention="sdpa"), plant.offset(1.0, where=None), HALF),
        pair("gelu-erf", GPT2, plant.activation("gelu", None)),
        pair("gelu-for-silu", replace(LLAMA, attention="sdpa", layers=8), plant.activation("gelu"), HALF),
        pair("relu", GEMMA, plant.activation("relu"), precision="bf16"),
        pair("scale-missing", replace(LLAMA, attention="sdpa"), plant.scores_scaled(4.0)),
        pair("scale-one-fp16", replace(GPT2, layers=8), plant.scores_scaled(0.25, None), HALF),
        pair("softmax-bf16", replace(GEMMA, sharpness=6.0), plant.softmax_in("bf16")),
        pair("softmax-fp16", replace(LLAMA, attention="sdpa", sharpness=4.0), plant.softmax_in("fp16")),
        pair("softmax-bf16-one", GPT2, plant.softmax_in("bf16", None)),
    ]


def _masks() -> list[Pair]:
    sdpa = replace(LLAMA, attention="sdpa")
    return [
        pair("mask-ahead", replace(LLAMA, attention="sdpa-causal", layers=8), plant.leak()),
        pair("mask-ahead-one", GPT2, plant.leak(2, None), HALF),
        pair("mask-weak", sdpa, plant.masking("weak", "layers.0.hidden", "mask_leak"), PADDED),
        pair("mask-none", GEMMA, plant.unmasked()),
        pair("mask-none-padded", replace(GPT2, attention="sdpa"), plant.unmasked(), PADDED),
        pair("mask-inf-padded", LLAMA, plant.masking("inf", "layers.1.hidden", "mask_nan"), PADDED),
        pair("mask-product-fp16", GPT2, plant.masking("product", "layers.0.hidden", "mask_nan"), HALF),
    ]


def _rotary() -> list[Pair]:
    sdpa = replace(LLAMA, attention="sdpa")
    angles = ("position", "inv_freq", "angle")
    inside = replace(LLAMA, rotary="inside")
    long = Setting(seq=128)
    return [
        pair("rope-bf16", replace(sdpa, outputs="stacked"), plant.rope_rounded("bf16", *angles), long),
        pair(
            "rope-fp16", replace(GEMMA, layers=8), plant.rope_rounded("fp16", *angles), long, precision="fp16"
        ),
        pair("rope-inv-freq", sdpa, plant.rope_rounded("fp16", "inv_freq"), long, batch=2),
        pair("rope-one-layer", inside, plant.rope_rounded("bf16", "angle", where=3), long),
        pair("rope-shift", replace(GEMMA, attention="sdpa"), plant.rope_shifted(1)),
        pair("rope-shift-fp16", replace(LLAMA, layers=8), plant.rope_shifted(5), HALF),
        pair("rope-padding", sdpa, plant.positions_with_padding(), PADDED),
        pair("rope-pairs", replace(GEMMA, outputs="all"), plant.rope_layout()),
        pair("rope-pairs-fp16", replace(sdpa, layers=8), plant.rope_layout(), HALF),
    ]


def _ranges() -> list[Pair]:
    rising = replace(LLAMA, layers=8, massive=((2, 45000.0), (5, 45000.0)))
    large = replace(LLAMA, layers=8, massive=((2, 1000.0),))
    return [
        pair("overflow-residual", rising, plant.overflow(5), HALF),
        pair(
            "overflow-residual-sdpa",
            replace(rising, style="gemma", attention="sdpa"),
            plant.overflow(5),
            HALF,
        ),
        pair("overflow-norm", large, plant.narrow_norms("layers.3.key"), HALF),
        pair("overflow-norm-gpt2", replace(large, style="gpt2"), plant.narrow_norms("layers.3.key"), HALF),
    ]


def _stale() -> list[Pair]:
    twice = replace(LLAMA, calls=2)
    return [
        pair("stale-second-call", twice, plant.stale_calls()),
        pair(
            "stale-second-call-fp16",
            replace(twice, style="gemma", attention="sdpa"),
            plant.stale_calls(),
            HALF,
        ),
        pair("stale-frame", replace(LLAMA, outputs="stacked"), plant.stale_cache(64)),
    ]


def _several() -> list[Pair]:
    return [
        pair(
            "two-gains",
            replace(LLAMA, layers=10),
            plant.both(weights.gain("value", 1.02, 2), weights.gain("key", 1.03, 7)),
        ),
        pair(
            "heads-and-activation",
            replace(GPT2, layers=10),
            plant.both(weights.permuted("key", "head", 2), plant.activation("relu", 7)),
            HALF,
        ),
        pair(
            "rope-and-int8",
            replace(LLAMA, attention="sdpa", layers=8),
            plant.both(
                plant.rope_rounded("bf16", "position", "inv_freq", "angle"),
                weights.int8("down", 5, per_tensor=True),
            ),
            seq=128,
        ),
        pair("noise", replace(LLAMA, layers=8), plant.noise(0.01, 64)),
        pair("noise-fp16", replace(GPT2, attention="sdpa"), plant.noise(0.05, 64), HALF),
    ]


def _massive() -> list[Pair]:
    """Faults under a massive activation, which hides them in the norm of the whole tensor."""
    large = replace(LLAMA, layers=8, massive=((1, 1000.0),))
    return [
        pair("massive-down-gain", large, weights.gain("down", 1.1, 4)),
        pair(
            "massive-value-gain-fp16", replace(large, attention="sdpa"), weights.gain("value", 1.05, 5), HALF
        ),
        pair("massive-activation-bf16", large, plant.activation("relu", 4), precision="bf16"),
        pair(
            "massive-scale-bf16", replace(large, style="gemma"), plant.scores_scaled(4.0, 4), precision="bf16"
        ),
    ]


def _stored() -> list[Pair]:
    """Weights kept in bf16, activations in fp32: a floor of bf16 weights."""
    sdpa = replace(LLAMA, attention="sdpa")
    how = Setting(precision="bf16-stored", declared="bf16-weights")
    long = replace(how, seq=128)
    return [
        pair("stored-value-gain", replace(sdpa, layers=10), weights.gain("value", 1.05), how),
        pair("stored-up-gain", replace(GPT2, layers=8), weights.gain("up", 1.2), how),
        pair("stored-key-bias", replace(LLAMA, bias=True), weights.no_bias("key", "all"), how),
        pair("stored-heads", replace(sdpa, kv_heads=4), weights.permuted("key", "head"), how),
        pair("stored-rope", GEMMA, plant.rope_rounded("bf16", "position", "inv_freq", "angle"), long),
        pair("stored-rope-shift", replace(sdpa, layers=8), plant.rope_shifted(-1), how),
        pair("stored-eps", replace(LLAMA, scale=0.02), plant.eps(1e-3), how),
        pair("stored-offset", GEMMA, plant.offset(0.0, norm=2, where=None), how),
        pair("stored-relu", replace(GPT2, attention="sdpa"), plant.activation("relu"), how),
        pair("stored-scale", replace(sdpa, layers=24), plant.scores_scaled(2.0), how),
        pair("stored-order", replace(GEMMA, layers=12), weights.layers_swapped, how),
        pair("stored-leak", LLAMA, plant.leak(3), how, batch=2),
    ]


def _opaque() -> list[Pair]:
    """Candidates of which no more is seen than of an engine; without hidden states there is no replay."""
    sdpa = replace(LLAMA, attention="sdpa")
    none = ("layers.*.hidden",)
    outputs = Setting(opaque="outputs")
    hidden = Setting(opaque="hidden", exclude=("layers.*.key", "layers.*.value"))
    angles = ("position", "inv_freq", "angle")
    return [
        pair(
            "opaque-rope",
            replace(sdpa, layers=8, outputs="stacked"),
            plant.rope_rounded("bf16", *angles),
            outputs,
        ),
        pair(
            "opaque-rope-fp16",
            replace(GEMMA, layers=8, outputs="stacked"),
            plant.rope_rounded("fp16", *angles),
            outputs,
            precision="fp16",
            seq=128,
        ),
        pair(
            "opaque-key-gain",
            replace(LLAMA, layers=24, outputs="interleaved"),
            weights.gain("key", 1.02),
            outputs,
        ),
        pair(
            "opaque-value-heads",
            replace(sdpa, kv_heads=4, outputs="interleaved"),
            weights.permuted("value", "head"),
            outputs,
            batch=3,
        ),
        pair(
            "opaque-offset",
            replace(GEMMA, layers=12, outputs="stacked"),
            plant.offset(0.0),
            outputs,
            precision="bf16",
        ),
        pair("opaque-swapped", replace(LLAMA, outputs="interleaved"), plant.swapped_outputs(), outputs),
        pair(
            "opaque-zero",
            replace(LLAMA, layers=18, outputs="stacked"),
            weights.collapsed("key"),
            outputs,
            precision="fp16",
        ),
        pair("hidden-down-gain", replace(sdpa, layers=12), weights.gain("down", 1.1), hidden),
        pair("hidden-value-gain", replace(GPT2, layers=8), weights.gain("value", 1.2), hidden),
        pair(
            "hidden-activation",
            replace(GEMMA, attention="sdpa"),
            plant.activation("relu", None),
            hidden,
            precision="fp16",
        ),
        pair("hidden-rope", replace(LLAMA, layers=8), plant.rope_rounded("bf16", *angles), hidden, seq=128),
        pair(
            "hidden-overflow",
            replace(LLAMA, layers=8, massive=((2, 45000.0), (5, 45000.0))),
            plant.overflow(5),
            hidden,
            precision="fp16",
        ),
        pair(
            "clean-opaque-interleaved",
            replace(sdpa, layers=24, outputs="interleaved"),
            plant.nothing,
            outputs,
            precision="fp16",
            exclude=none,
        ),
        pair("clean-hidden-bf16", replace(GEMMA, layers=12), plant.nothing, hidden, precision="bf16"),
    ]


def _clean() -> list[Pair]:
    sdpa = replace(LLAMA, attention="sdpa")
    none = plant.nothing
    other = plant.attention_as
    massive = ((1, 1000.0),)
    hidden = ("layers.*.hidden",)
    return [
        pair("clean-itself", LLAMA, none),
        pair("clean-sdpa-for-explicit", replace(GEMMA, layers=8), other("sdpa")),
        pair("clean-explicit-for-causal", replace(LLAMA, attention="sdpa-causal"), other("explicit")),
        pair("clean-fp16", replace(LLAMA, layers=12, outputs="stacked"), none, HALF),
        pair("clean-fp16-gpt2", replace(GPT2, attention="sdpa", layers=12), none, HALF),
        pair("clean-bf16-padded", replace(GEMMA, outputs="all"), other("sdpa"), PADDED, precision="bf16"),
        pair("clean-bf16-stored", sdpa, none, precision="bf16-stored", declared="bf16-weights"),
        pair("clean-massive-bf16", replace(LLAMA, layers=8, massive=massive), none, precision="bf16"),
        pair("clean-massive-fp16", replace(GPT2, massive=massive), none, HALF, batch=2),
        pair("clean-tf32", sdpa, plant.undeclared(plant.arithmetic("tf32", "tf32")), declared="tf32"),
        pair(
            "clean-opaque-fp16",
            replace(LLAMA, outputs="stacked"),
            none,
            HALF,
            opaque="outputs",
            exclude=hidden,
        ),
        pair("clean-24-layers-fp16", replace(sdpa, layers=24, sharpness=4.0), none, HALF, batch=2),
        pair("clean-two-calls-fp16", replace(GEMMA, calls=2), none, HALF),
        pair("clean-padding-garbage", LLAMA, plant.garbage_at_padding, PADDED),
        pair("clean-output-order", replace(LLAMA, outputs="all"), plant.outputs_reordered, HALF),
        pair("clean-wrapper", replace(GPT2, outputs="interleaved"), plant.wrapped),
    ]


PAIRS: tuple[Pair, ...] = (
    *_weights(),
    *_quantised(),
    *_operators(),
    *_masks(),
    *_rotary(),
    *_ranges(),
    *_stale(),
    *_several(),
    *_massive(),
    *_stored(),
    *_opaque(),
    *_clean(),
)
