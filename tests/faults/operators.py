"""The operators of `tests.faults.models`, each with a switch to run it wrong, and the shape of a decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """What a decoder is.

    Attributes:
        style: llama (RMSNorm, SwiGLU), gemma (1 + w, GeGLU, one KV head, scaled embedding) or gpt2
            (LayerNorm, biases, learned positions, fused projection).
        layers, hidden, heads, kv_heads, head_dim, inner: sizes.
        attention: written out, `scaled_dot_product_attention` with a mask, or with `is_causal`.
        outputs: the last hidden state alone, or with keys and values: stacked along the layers, one
            output each, or key and value interleaved in one.
        rotary: angles computed once outside of the blocks, or by each of them.
        bias: whether query, key and value have biases (as in Qwen); GPT-2 always has.
        sharpness: factor on the query: how far attention is from uniform.
        scale: standard deviation of the embedding.
        massive: (layer, amount) from which on a channel holds that much more; layer -1 is the embedding.
        calls: how often the blocks run in one forward, as in unrolled denoising.
    """

    style: Literal["llama", "gemma", "gpt2"] = "llama"
    layers: int = 6
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    inner: int = 160
    attention: Literal["explicit", "sdpa", "sdpa-causal"] = "explicit"
    outputs: Literal["hidden", "stacked", "all", "interleaved"] = "hidden"
    rotary: Literal["outside", "inside"] = "outside"
    bias: bool = False
    sharpness: float = 2.0
    scale: float = 1.0
    massive: tuple[tuple[int, float], ...] = ()
    calls: int = 1

    @property
    def groups(self) -> int:
        """KV heads: as many as queries in GPT-2, one in Gemma."""
        return {"gpt2": self.heads, "gemma": 1}.get(self.style, self.kv_heads)

    def massive_before(self, layer: int) -> float:
        """What the massive channel holds at the input of `layer`."""
        return sum(amount for start, amount in self.massive if start < layer)


CHANNEL = 5
"""The channel that may hold a massive activation."""


class Projection(nn.Linear):
    """A linear layer.

    Attributes:
        arithmetic: "" for torch's own; `tf32` rounds both operands to 10 mantissa bits; `fp16` and
            `bf16` keep the running sum in that, `chunk` products at a time.
    """

    arithmetic: str = ""
    chunk: int = 1

    def forward(self, x: Tensor) -> Tensor:
        """Maps the last axis; weights kept in fewer bits than `x` are converted first."""
        weight = self.weight.to(x.dtype)
        held: Tensor | None = self._parameters["bias"]
        bias = None if held is None else held.to(x.dtype)
        if self.arithmetic == "tf32":
            return F.linear(ten_bits(x), ten_bits(weight), bias)
        if self.arithmetic:
            dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[self.arithmetic]
            total = accumulated(x, weight, dtype, self.chunk).to(x.dtype)
            return total if bias is None else total + bias
        return F.linear(x, weight, bias)


def views(projection: Projection) -> tuple[Tensor, Tensor | None]:
    """Its weight and its bias, to be written into."""
    bias: Tensor | None = projection._parameters["bias"]
    return projection.weight.data, None if bias is None else bias.data


def ten_bits(x: Tensor) -> Tensor:
    """Fp32 rounded to 10 explicit mantissa bits by Veltkamp's splitting (Dekker 1971)."""
    wide = x.double()
    product = wide * (2.0 ** (53 - 11) + 1.0)
    return (product - (product - wide)).to(x.dtype)


def accumulated(x: Tensor, weight: Tensor, dtype: torch.dtype, chunk: int) -> Tensor:
    """`x @ weight.T` with the running sum rounded to `dtype` after every `chunk` products."""
    left, right = x.float(), weight.float().T
    total = torch.zeros(*x.shape[:-1], weight.shape[0], dtype=dtype)
    for k in range(0, x.shape[-1], chunk):
        total = (total.float() + left[..., k : k + chunk] @ right[k : k + chunk]).to(dtype)
    return total


class Norm(nn.Module):
    """RMS or layer normalisation over the last axis.

    Attributes:
        eps: added to the mean square.
        offset: added to the gain; 1 in Gemma.
        wide: whether the statistics are taken in fp32.
    """

    def __init__(self, shape: Shape, generator: torch.Generator, layer: int) -> None:
        super().__init__()
        self.centred = shape.style == "gpt2"
        self.eps, self.offset, self.wide = 1e-5, float(shape.style == "gemma"), True
        gain = 1.0 + 0.2 * torch.randn(shape.hidden, generator=generator)
        if massive := shape.massive_before(layer):
            # As trained models do: the massive channel enters with weight one, and so do the others, whose
            # variance grows by about a half in each layer.
            gain *= max(1.0, massive / shape.hidden**0.5) * (1 + 0.5 * layer) ** -0.5
            gain[CHANNEL] = shape.hidden**-0.5
        self.weight = nn.Parameter(gain - self.offset)
        self.bias = (
            nn.Parameter(0.1 * torch.randn(shape.hidden, generator=generator)) if self.centred else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `[..., hidden]`; the result has the dtype of `x`."""
        held = x.float() if self.wide else x
        if self.centred:
            held = held - held.mean(-1, keepdim=True)
        held = held * torch.rsqrt((held * held).mean(-1, keepdim=True) + self.eps)
        held = held * (self.weight.to(held.dtype) + self.offset)
        return (held if self.bias is None else held + self.bias.to(held.dtype)).to(x.dtype)


class Rotary(nn.Module):
    """Cosine and sine of position times frequency.

    Attributes:
        rounded: which of position, inv_freq, angle and table are rounded to `dtype`.
        shift: added to every position.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        exponent = torch.arange(0, head_dim, 2).double() / head_dim
        self.register_buffer("inv_freq", (10000.0**-exponent).float(), persistent=False)
        self.rounded: tuple[str, ...] = ()
        self.dtype = torch.float32
        self.shift = 0

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`[batch, seq]` -> cosine and sine `[batch, 1, seq, head_dim / 2]` in `dtype`."""
        position = self._as("position", (positions + self.shift).float())
        frequency = self._as("inv_freq", self.inv_freq.float())
        angle = self._as("angle", position[:, None, :, None] * frequency)
        return self._as("table", angle.cos()).to(dtype), self._as("table", angle.sin()).to(dtype)

    def _as(self, name: str, x: Tensor) -> Tensor:
        return x.to(self.dtype).float() if name in self.rounded else x


def turn(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Turns channel pairs of `[batch, head, seq, head_dim]`: (i, i + d / 2) or, `pairs`, (2i, 2i + 1)."""
    if layout == "pairs":
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def projection(
    fan_in: int, fan_out: int, generator: torch.Generator, *, gain: float = 1.0, bias: bool = False
) -> Projection:
    """Weights N(0, gain^2 / fan_in), biases N(0, (gain / 2)^2)."""
    made = Projection(fan_in, fan_out, bias=bias)
    made.weight.copy_(torch.randn(fan_out, fan_in, generator=generator) * gain * fan_in**-0.5)
    if made.bias is not None:
        made.bias.copy_(0.5 * gain * torch.randn(fan_out, generator=generator))
    return made
