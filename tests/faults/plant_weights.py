"""Faults of weights, each planted into a deep copy of a decoder; see `tests.faults.plant`."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from tests.faults.models import Decoder
from tests.faults.planting import HALVES, Fault, Planted, changed, drawn, layers_of, site_of


def gain(part: str, factor: float, where: int | str | None = None) -> Fault:
    """A projection `factor` times too large."""
    return changed("weight_scale", part, lambda w: w * factor, where, gain=factor)


def collapsed(part: str, where: int | str | None = "from", value: float = 0.0) -> Fault:
    """A projection of nothing but `value`."""
    return changed("weights_collapsed", part, lambda w: torch.full_like(w, value), where)


def rounded_weights(part: str, precision: str, where: int | str | None = None) -> Fault:
    """A projection rounded to half precision in a model that is said to have fp32 weights."""
    dtype = HALVES[precision]
    return changed("weight_precision", part, lambda w: w.to(dtype).to(w.dtype), where, precision=precision)


def int8(part: str, where: int | str | None = None, *, per_tensor: bool) -> Fault:
    """A projection through symmetric int8, with one step for the tensor or one for each output channel."""

    def change(w: Tensor) -> Tensor:
        step = (w.abs().max() if per_tensor else w.abs().amax(1, keepdim=True)) / 127
        return torch.clamp((w / step).round(), -127, 127) * step

    return changed("quant_int8", part, change, where, per_tensor=per_tensor)


def fp8(part: str, where: int | str | None = None) -> Fault:
    """A projection through float8 e4m3 scaled to its largest value."""

    def change(w: Tensor) -> Tensor:
        step = w.abs().max() / 448
        return (w / step).to(torch.float8_e4m3fn).to(w.dtype) * step

    return changed("quant_fp8", part, change, where)


def misread_weights(part: str, written: torch.dtype, read: torch.dtype, where: int | None = None) -> Fault:
    """A projection stored in one 16-bit type and loaded as the other."""

    def change(w: Tensor) -> Tensor:
        return w.to(written).view(read).to(w.dtype).nan_to_num()

    return changed("dtype_misread", part, change, where, written=str(written), read=str(read))


def permuted(part: str, unit: str, where: int | None = None) -> Fault:
    """Rows of a projection in another order: whole heads, or the channels of all."""

    def plant(model: Decoder, draw: np.random.Generator) -> tuple[nn.Module, tuple[Planted, ...]]:
        made = copy.deepcopy(model)
        layer = drawn(model, draw, where)
        weight, bias = made.block(layer).part(part)
        size = model.shape.head_dim if unit == "head" else 1
        count = weight.shape[0] // size
        order = np.roll(np.arange(count), int(draw.integers(1, count)))
        if unit == "channel":
            order = draw.permutation(count)
        rows = torch.from_numpy((order[:, None] * size + np.arange(size)).reshape(-1))
        for tensor in (weight, bias):
            if tensor is not None:
                tensor.copy_(tensor[rows].clone())
        parameters = {"layer": layer, "unit": unit, "order": order.tolist()}
        return made, (Planted(site_of(layer, part), "weight_permuted", parameters),)

    return plant


def no_bias(part: str, where: int | str | None = None) -> Fault:
    """The bias of a projection left out."""

    def plant(model: Decoder, draw: np.random.Generator) -> tuple[nn.Module, tuple[Planted, ...]]:
        made = copy.deepcopy(model)
        layers = layers_of(model, draw, where)
        for layer in layers:
            _, bias = made.block(layer).part(part)
            assert bias is not None
            bias.zero_()
        return made, (Planted(site_of(layers[0], part), "bias_missing", {"layer": layers[0]}),)

    return plant


def swapped_weights(where: int | str | None = None) -> Fault:
    """Key and value projections exchanged."""

    def plant(model: Decoder, draw: np.random.Generator) -> tuple[nn.Module, tuple[Planted, ...]]:
        made = copy.deepcopy(model)
        layers = layers_of(model, draw, where)
        for layer in layers:
            keys, values = made.block(layer).part("key"), made.block(layer).part("value")
            for key, value in zip(keys, values, strict=True):
                if key is not None and value is not None:
                    kept = key.clone()
                    key.copy_(value)
                    value.copy_(kept)
        return made, (Planted(f"layers.{layers[0]}.key", "kv_swapped", {"layer": layers[0]}),)

    return plant


def layers_swapped(model: Decoder, draw: np.random.Generator) -> tuple[nn.Module, tuple[Planted, ...]]:
    """Two layers exchanged."""
    made = copy.deepcopy(model)
    first, second = sorted(int(n) for n in draw.choice(model.shape.layers, 2, replace=False))
    blocks = list(made.blocks)
    blocks[first], blocks[second] = blocks[second], blocks[first]
    made.blocks = nn.ModuleList(blocks)
    return made, (Planted(f"layers.{first}.key", "layer_order", {"layer": first, "holds": second}),)
