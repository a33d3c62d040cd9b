"""Faults of code, each planted into a deep copy of a decoder by a switch of its operators.

A fault is a function of the clean model and a random generator, from which it draws its layer and its
parameters. It gives back the copy and what is true of it by construction: the first site that differs, the
id of the cause, and the parameters. Faults of weights are in `tests.faults.plant_weights`.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tests.faults.models import VOCABULARY, Decoder
from tests.faults.operators import Norm, Projection
from tests.faults.planting import HALVES, Fault, Planted, drawn, setting, switched, whole

if TYPE_CHECKING:
    import numpy as np


def eps(value: float, norm: int = 1, where: int | str | None = "all") -> Fault:
    """Another epsilon in the norm before attention (1) or before the feed-forward (2)."""
    tensor = "key" if norm == 1 else "hidden"
    return switched("norm_eps", tensor, setting(f"norm{norm}.eps", value), where, eps=value)


def offset(value: float, norm: int = 1, where: int | str | None = "all") -> Fault:
    """Another offset of the gain: 0 where Gemma adds 1, 1 where Llama adds nothing."""
    tensor = "key" if norm == 1 else "hidden"
    return switched("norm_offset", tensor, setting(f"norm{norm}.offset", value), where, offset=value)


def activation(name: str, where: int | str | None = "all") -> Fault:
    """Another activation function."""
    return switched("activation", "hidden", setting("feed.activation", name), where, activation=name)


def scores_scaled(ratio: float, where: int | str | None = "all") -> Fault:
    """Attention scores `ratio` times as large as they should be."""

    def apply(block: Any) -> None:
        block.mixer.factor *= ratio

    return switched("attention_scale", "hidden", apply, where, ratio=ratio)


def softmax_in(precision: str, where: int | str | None = "all") -> Fault:
    """Scores and probabilities in half precision, attention written out."""

    def apply(block: Any) -> None:
        block.mixer.kind = "explicit"
        block.mixer.softmax = HALVES[precision]

    return switched("softmax_precision", "hidden", apply, where, precision=precision)


def leak(ahead: int = 1, where: int | str | None = "all") -> Fault:
    """A causal mask off by `ahead`: queries see that many later tokens."""
    return switched("mask_leak", "hidden", setting("mixer.ahead", ahead), where, ahead=ahead)


def unmasked(where: int | str | None = "all") -> Fault:
    """No mask at all."""
    return switched("mask_missing", "hidden", setting("mixer.blind", True), where)


def masking(kind: str, site: str, cause: str) -> Fault:
    """Another way to write the mask; see `Decoder.masking`."""
    return whole(site, cause, setting("masking", kind), mask=kind)


def rope_rounded(precision: str, *rounded: str, where: int | None = None) -> Fault:
    """Rotary angles in half precision: all layers, or one where the blocks compute their own."""

    def apply(owner: Any) -> None:
        owner.rotary.rounded, owner.rotary.dtype = rounded, HALVES[precision]

    parameters: dict[str, Any] = {"precision": precision, "rounded": rounded}
    if where is None:
        return whole("layers.0.key", "rope_precision", apply, **parameters)
    return switched("rope_precision", "key", lambda block: apply(block.mixer), where, **parameters)


def rope_shifted(by: int) -> Fault:
    """All positions off by `by`."""
    return whole("layers.0.key", "rope_position", setting("rotary.shift", by), shift=by)


def positions_with_padding() -> Fault:
    """Positions count padding too."""
    return whole("layers.0.key", "rope_position", setting("counted", False))


def rope_layout(where: int | str = "all") -> Fault:
    """Pairs of neighbours turned instead of halves."""
    return switched("rope_layout", "key", setting("mixer.layout", "pairs"), where)


def overflow(layer: int) -> Fault:
    """Nothing but the range of fp16: the residual stream leaves it in the output of `layer`."""
    return whole(f"layers.{layer}.hidden", "overflow_residual", lambda _: None, layer=layer)


def narrow_norms(site: str) -> Fault:
    """Norm statistics in the model's own dtype: squares overflow in fp16."""

    def apply(model: Decoder) -> None:
        for module in model.modules():
            if isinstance(module, Norm):
                module.wide = False

    return whole(site, "overflow_norm", apply)


def arithmetic(cause: str, kind: str, chunk: int = 1, where: int | None = None, part: str = "") -> Fault:
    """Products of all projections, or those of one block, computed as `Projection.arithmetic` says."""

    def apply(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, Projection):
                module.arithmetic, module.chunk = kind, chunk

    if where is None:
        return whole("layers.0.key", cause, apply, precision=kind)
    return switched(cause, "hidden", lambda block: apply(block.feed), where, precision=kind)


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
    return whole("layers.0.key", "kv_swapped", setting("swapped", True))


def misread(written: torch.dtype, read: torch.dtype) -> Fault:
    """The bits of keys and values written in one type and read as another."""
    parameters = {"written": str(written), "read": str(read)}
    return whole("layers.0.key", "dtype_misread", setting("misread", (written, read)), **parameters)


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
    return undeclared(switched("", "", setting("mixer.kind", kind), "all"))


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
