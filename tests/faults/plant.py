"""Faults, each planted into a deep copy of a decoder: changed weights, or a switch of the model's code.

A fault is a function of the clean model and a random generator, from which it draws its layer and its
parameters. It gives back the copy and what is true of it by construction: the first site that differs, the
id of the cause, and the parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.faults.models import VOCABULARY, Decoder, Norm, Projection

SITE = {"key": "key", "value": "value"}
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Planted:
    """What is true of a candidate.

    Attributes:
        site: the first that differs because of this fault.
        cause: its id.
        parameters: what can be estimated of it.
    """

    site: str
    cause: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


Fault = Callable[[Decoder, np.random.Generator], tuple[nn.Module, tuple[Planted, ...]]]


def site_of(layer: int, part: str) -> str:
    """The first site that a change of this projection reaches."""
    return f"layers.{layer}.{SITE.get(part, 'hidden')}"


def drawn(model: Decoder, draw: np.random.Generator, layer: int | None) -> int:
    """The layer asked for, or one between the first and the last."""
    return int(draw.integers(1, model.shape.layers - 1)) if layer is None else layer


def _layers(model: Decoder, draw: np.random.Generator, where: int | str | None) -> list[int]:
    if where == "all":
        return list(range(model.shape.layers))
    if where == "from":
        return list(range(drawn(model, draw, None), model.shape.layers))
    assert not isinstance(where, str)
    return [drawn(model, draw, where)]


def _changed(
    cause: str, part: str, change: Callable[[Tensor], Tensor], where: int | str | None, **parameters: Any
) -> Fault:
    """The weights of `part` replaced by `change` of them in one layer, all, or all `from` one on."""

    def plant(model: Decoder, draw: np.random.Generator) -> tuple[nn.Module, tuple[Planted, ...]]:
        made = copy.deepcopy(model)
        layers = _layers(model, draw, where)
        for layer in layers:
            weight, _ = made.block(layer).part(part)
            weight.copy_(change(weight))
        return made, (Planted(site_of(layers[0], part), cause, {"layer": layers[0], **parameters}),)

    return plant


def gain(part: str, factor: float, where: int | str | None = None) -> Fault:
    """A projection `factor` times too large."""
    return _changed("weight_scale", part, lambda w: w * factor, where, gain=factor)


def collapsed(part: str, where: int | str | None = "from", value: float = 0.0) -> Fault:
    """A projection of nothing but `value`."""
    return _changed("weights_collapsed", part, lambda w: torch.full_like(w, value), where)


def rounded_weights(part: str, precision: str, where: int | str | None = None) -> Fault:
    """A projection rounded to half precision in a model that is said to have fp32 weights."""
    dtype = HALVES[precision]
    return _changed("weight_precision", part, lambda w: w.to(dtype).to(w.dtype), where, precision=precision)


def int8(part: str, where: int | str | None = None, *, per_tensor: bool) -> Fault:
    """A projection through symmetric int8, with one step for the tensor or one for each output channel."""

    def change(w: Tensor) -> Tensor:
        step = (w.abs().max() if per_tensor else w.abs().amax(1, keepdim=True)) / 127
        return torch.clamp((w / step).round(), -127, 127) * step

    return _changed("quant_int8", part, change, where, per_tensor=per_tensor)


def fp8(part: str, where: int | str | None = None) -> Fault:
    """A projection through float8 e4m3 scaled to its largest value."""

    def change(w: Tensor) -> Tensor:
        step = w.abs().max() / 448
        return (w / step).to(torch.float8_e4m3fn).to(w.dtype) * step

    return _changed("quant_fp8", part, change, where)


def misread_weights(part: str, written: torch.dtype, read: torch.dtype, where: int | None = None) -> Fault:
    """A projection stored in one 16-bit type and loaded as the other."""

    def change(w: Tensor) -> Tensor:
        return w.to(written).view(read).to(w.dtype).nan_to_num()

    return _changed("dtype_misread", part, change, where, written=str(written), read=str(read))


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
        layers = _layers(model, draw, where)
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
        layers = _layers(model, draw, where)
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


def _switched(
    cause: str,
    tensor: str,
    apply: Callable[[Any], None],
    where: int | str | None,
    **parameters: Any,
) -> Fault:
    """`apply` called on the blocks of one layer or all; the first site is `tensor` of the first."""

    def plant(model: Decoder, draw: np.random.Generator) -> tuple[nn.Module, tuple[Planted, ...]]:
        made = copy.deepcopy(model)
        layers = _layers(model, draw, where)
        for layer in layers:
            apply(made.block(layer))
        return made, (Planted(f"layers.{layers[0]}.{tensor}", cause, {"layer": layers[0], **parameters}),)

    return plant


def _set(path: str, value: Any) -> Callable[[Any], None]:
    *owners, name = path.split(".")

    def apply(module: Any) -> None:
        for owner in owners:
            module = getattr(module, owner)
        setattr(module, name, value)

    return apply


def eps(value: float, norm: int = 1, where: int | str | None = "all") -> Fault:
    """Another epsilon in the norm before attention (1) or before the feed-forward (2)."""
    tensor = "key" if norm == 1 else "hidden"
    return _switched("norm_eps", tensor, _set(f"norm{norm}.eps", value), where, eps=value)


def offset(value: float, norm: int = 1, where: int | str | None = "all") -> Fault:
    """Another offset of the gain: 0 where Gemma adds 1, 1 where Llama adds nothing."""
    tensor = "key" if norm == 1 else "hidden"
    return _switched("norm_offset", tensor, _set(f"norm{norm}.offset", value), where, offset=value)


def activation(name: str, where: int | str | None = "all") -> Fault:
    """Another activation function."""
    return _switched("activation", "hidden", _set("feed.activation", name), where, activation=name)


def scores_scaled(ratio: float, where: int | str | None = "all") -> Fault:
    """Attention scores `ratio` times as large as they should be."""

    def apply(block: Any) -> None:
        block.mixer.factor *= ratio

    return _switched("attention_scale", "hidden", apply, where, ratio=ratio)


def softmax_in(precision: str, where: int | str | None = "all") -> Fault:
    """Scores and probabilities in half precision, attention written out."""

    def apply(block: Any) -> None:
        block.mixer.kind = "explicit"
        block.mixer.softmax = HALVES[precision]

    return _switched("softmax_precision", "hidden", apply, where, precision=precision)


def leak(ahead: int = 1, where: int | str | None = "all") -> Fault:
    """A causal mask off by `ahead`: queries see that many later tokens."""
    return _switched("mask_leak", "hidden", _set("mixer.ahead", ahead), where, ahead=ahead)


def unmasked(where: int | str | None = "all") -> Fault:
    """No mask at all."""
    return _switched("mask_missing", "hidden", _set("mixer.blind", True), where)


def _whole(site: str, cause: str, apply: Callable[[Any], None], **parameters: Any) -> Fault:
    """`apply` called on the model."""

    def plant(model: Decoder, draw: np.random.Generator) -> tuple[nn.Module, tuple[Planted, ...]]:
        made = copy.deepcopy(model)
        apply(made)
        return made, (Planted(site, cause, parameters),)

    return plant


def masking(kind: str, site: str, cause: str) -> Fault:
    """Another way to write the mask; see `Decoder.masking`."""
    return _whole(site, cause, _set("masking", kind), mask=kind)


def rope_rounded(precision: str, *rounded: str, where: int | None = None) -> Fault:
    """Rotary angles in half precision: all layers, or one where the blocks compute their own."""

    def apply(owner: Any) -> None:
        owner.rotary.rounded, owner.rotary.dtype = rounded, HALVES[precision]

    parameters: dict[str, Any] = {"precision": precision, "rounded": rounded}
    if where is None:
        return _whole("layers.0.key", "rope_precision", apply, **parameters)
    return _switched("rope_precision", "key", lambda block: apply(block.mixer), where, **parameters)


def rope_shifted(by: int) -> Fault:
    """All positions off by `by`."""
    return _whole("layers.0.key", "rope_position", _set("rotary.shift", by), shift=by)


def positions_with_padding() -> Fault:
    """Positions count padding too."""
    return _whole("layers.0.key", "rope_position", _set("counted", False))


def rope_layout(where: int | str = "all") -> Fault:
    """Pairs of neighbours turned instead of halves."""
    return _switched("rope_layout", "key", _set("mixer.layout", "pairs"), where)


def overflow(layer: int) -> Fault:
    """Nothing but the range of fp16: the residual stream leaves it in the output of `layer`."""
    return _whole(f"layers.{layer}.hidden", "overflow_residual", lambda _: None, layer=layer)


def narrow_norms(site: str) -> Fault:
    """Norm statistics in the model's own dtype: squares overflow in fp16."""

    def apply(model: Decoder) -> None:
        for module in model.modules():
            if isinstance(module, Norm):
                module.wide = False

    return _whole(site, "overflow_norm", apply)


def arithmetic(cause: str, kind: str, chunk: int = 1, where: int | None = None, part: str = "") -> Fault:
    """Products of all projections, or those of one block, computed as `Projection.arithmetic` says."""

    def apply(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, Projection):
                module.arithmetic, module.chunk = kind, chunk

    if where is None:
        return _whole("layers.0.key", cause, apply, precision=kind)
    return _switched(cause, "hidden", lambda block: apply(block.feed), where, precision=kind)


def stale_calls(where: int | None = None) -> Fault:
    """The second call of a layer reads keys and values of the first."""

    def plant(model: Decoder, draw: np.random.Generator) -> tuple[nn.Module, tuple[Planted, ...]]:
        made = copy.deepcopy(model)
        layer = drawn(model, draw, where)
        made.block(layer).mixer.stale = True
        return made, (Planted(f"layers.{layer}.key@2", "stale_kv", {"layer": layer}),)

    return plant


class PreviousFrame(nn.Module):
    """Hands out the keys and values of an earlier run with the results of this one."""

    def __init__(self, model: Decoder, earlier: Tensor) -> None:
        super().__init__()
        with torch.inference_mode():
            before = model(earlier)
        self.model = model
        self.before = {n: t.clone() for n, t in before.items() if n != "last_hidden_state"}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {**self.model(input_ids, attention_mask), **self.before}


def stale_cache(seq: int, batch: int = 1) -> Fault:
    """Keys and values of an earlier frame."""

    def plant(model: Decoder, draw: np.random.Generator) -> tuple[nn.Module, tuple[Planted, ...]]:
        ids = torch.from_numpy(draw.integers(0, VOCABULARY, (batch, seq)))
        return PreviousFrame(copy.deepcopy(model), ids), (Planted("layers.0.key", "stale_kv"),)

    return plant


def swapped_outputs() -> Fault:
    """Keys handed out as values, and values as keys."""
    return _whole("layers.0.key", "kv_swapped", _set("swapped", True))


def misread(written: torch.dtype, read: torch.dtype) -> Fault:
    """The bits of keys and values written in one type and read as another."""
    parameters = {"written": str(written), "read": str(read)}
    return _whole("layers.0.key", "dtype_misread", _set("misread", (written, read)), **parameters)


def noise(size: float, seq: int, where: int | None = None) -> Fault:
    """Noise on the output of a layer: nothing in the vocabulary."""

    def plant(model: Decoder, draw: np.random.Generator) -> tuple[nn.Module, tuple[Planted, ...]]:
        made = copy.deepcopy(model)
        layer = drawn(model, draw, where)
        values = draw.standard_normal((1, seq, model.shape.hidden)) * size
        made.block(layer).noise = torch.from_numpy(values).float()
        return made, (Planted(f"layers.{layer}.hidden", "unknown", {"layer": layer}),)

    return plant


def both(*faults: Fault) -> Fault:
    """Several faults, in execution order."""

    def plant(model: Decoder, draw: np.random.Generator) -> tuple[nn.Module, tuple[Planted, ...]]:
        made: nn.Module = model
        found: list[Planted] = []
        for fault in faults:
            assert isinstance(made, Decoder)
            made, planted = fault(made, draw)
            found += planted
        return made, tuple(found)

    return plant


def nothing(model: Decoder, draw: np.random.Generator) -> tuple[nn.Module, tuple[Planted, ...]]:
    """A plain copy."""
    return copy.deepcopy(model), ()


def undeclared(fault: Fault) -> Fault:
    """The same model with nothing wrong: what differs is what the candidate is said to do."""

    def plant(model: Decoder, draw: np.random.Generator) -> tuple[nn.Module, tuple[Planted, ...]]:
        return fault(model, draw)[0], ()

    return plant


def attention_as(kind: str) -> Fault:
    """Another way to compute the same attention."""
    return undeclared(_switched("", "", _set("mixer.kind", kind), "all"))


class Spoiled(nn.Module):
    """Puts other tokens where the padding is."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        other = (input_ids * 7 + 13) % VOCABULARY
        found: dict[str, Tensor] = self.model(
            torch.where(attention_mask.bool(), input_ids, other), attention_mask
        )
        return found


def garbage_at_padding(model: Decoder, draw: np.random.Generator) -> tuple[nn.Module, tuple[Planted, ...]]:
    """Padded tokens are others for the candidate: nobody may see them."""
    return Spoiled(copy.deepcopy(model)), ()


class Wrapper(nn.Module):
    """An export wrapper: calls the model's own parts, and hands results out in its own order."""

    def __init__(self, model: Decoder, *, backwards: bool) -> None:
        super().__init__()
        self.model = model
        self.backwards = backwards

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        found = self.model(input_ids, attention_mask)
        return dict(reversed(found.items())) if self.backwards else dict(found)


def wrapped(model: Decoder, draw: np.random.Generator) -> tuple[nn.Module, tuple[Planted, ...]]:
    """The model within an export wrapper, its attention as an exporter prefers it."""
    made, _ = attention_as("sdpa")(model, draw)
    assert isinstance(made, Decoder)
    return Wrapper(made, backwards=False), ()


def outputs_reordered(model: Decoder, draw: np.random.Generator) -> tuple[nn.Module, tuple[Planted, ...]]:
    """The same outputs under the same names, in another order."""
    return Wrapper(copy.deepcopy(model), backwards=True), ()
