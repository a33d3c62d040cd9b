"""The bundled model: a small decoder in the style of Llama and Gemma, in pure torch.

RMSNorm, grouped-query attention, rotary embedding, gated MLP. As in the models that it stands
for, the angles of the rotary embedding are computed once, outside the layers, from the positions
and the buffer `inv_freq`, and every layer receives their cosine and sine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, scaled_dot_product_attention, silu


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the bundled model; `head_dim` must be even and `kv_heads` divide `query_heads`."""

    layers: int = 6
    hidden: int = 128
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 256
    vocabulary: int = 512
    rotary_base: float = 10000.0
    epsilon: float = 1e-6
    seed: int = 0


def _linear(fan_in: int, fan_out: int, generator: torch.Generator, gain: float = 1.0) -> nn.Linear:
    """A bias-free projection with weights N(0, gain^2 / fan_in): unit variance in gives gain^2 out.

    To be called without gradients.
    """
    linear = nn.Linear(fan_in, fan_out, bias=False)
    linear.weight.copy_(torch.randn(fan_out, fan_in, generator=generator) * gain * fan_in**-0.5)
    return linear


class RMSNorm(nn.Module):
    """Division by the root mean square over the last axis, then a gain per channel."""

    def __init__(self, size: int, epsilon: float, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(1.0 + 0.1 * torch.randn(size, generator=generator))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `x` `[..., size]`; the statistics are taken in fp32 whatever its dtype."""
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * scaled.to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Cosine and sine of position times frequency."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        self.register_buffer("inv_freq", (base**-exponents).float())

    def angles(self, position_ids: Tensor) -> Tensor:
        """Angles in radians, fp32 `[batch, seq, head_dim / 2]`, of positions `[batch, seq]`."""
        return position_ids[:, :, None].float() * self.inv_freq.float()

    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine `[batch, 1, seq, head_dim]` in `dtype`, for positions `[batch, seq]`."""
        angles = self.angles(position_ids)
        both = torch.cat((angles, angles), dim=-1)[:, None]
        return both.cos().to(dtype), both.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the channel pairs (i, i + head_dim / 2) of `x` `[batch, head, seq, head_dim]`."""
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention over an additive mask, written out or by torch's fused operator."""

    def __init__(self, config: DemoConfig, generator: torch.Generator, *, sdpa: bool) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.groups = config.query_heads // config.kv_heads
        self.sdpa = sdpa
        heads, kv = config.query_heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = _linear(config.hidden, heads, generator)
        self.k_proj = _linear(config.hidden, kv, generator)
        self.v_proj = _linear(config.hidden, kv, generator)
        self.o_proj = _linear(heads, config.hidden, generator, gain=(2 * config.layers) ** -0.5)

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], -1, self.head_dim).transpose(1, 2)

    def _repeated(self, x: Tensor) -> Tensor:
        batch, heads, seq, dim = x.shape
        spread = x[:, :, None].expand(batch, heads, self.groups, seq, dim)
        return spread.reshape(batch, heads * self.groups, seq, dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attention of `x` `[batch, seq, hidden]` to itself.

        Args:
            x: normalised input.
            cos, sin: of the rotary angles, `[batch, 1, seq, head_dim]`.
            mask: added to the scores, `[batch, 1, seq, seq]`.

        Returns:
            Output `[batch, seq, hidden]`; key after the rotary embedding and value, both
            `[batch, kv_head, seq, head_dim]`.
        """
        query = rotate(self._heads(self.q_proj(x)), cos, sin)
        key = rotate(self._heads(self.k_proj(x)), cos, sin)
        value = self._heads(self.v_proj(x))
        all_keys, all_values = self._repeated(key), self._repeated(value)
        if self.sdpa:
            mixed = scaled_dot_product_attention(query, all_keys, all_values, attn_mask=mask)
        else:
            scores = query @ all_keys.transpose(2, 3) * self.head_dim**-0.5 + mask
            mixed = scores.float().softmax(-1).to(value.dtype) @ all_values
        merged = mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)
        return self.o_proj(merged), key, value


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DemoConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.gate_proj = _linear(config.hidden, config.mlp, generator)
        self.up_proj = _linear(config.hidden, config.mlp, generator)
        self.down_proj = _linear(config.mlp, config.hidden, generator, gain=(2 * config.layers) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `x` `[batch, seq, hidden]` to the same shape."""
        return cast(Tensor, self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x)))


class DecoderLayer(nn.Module):
    """Attention and MLP, each on the normalised residual stream and added to it."""

    def __init__(self, config: DemoConfig, generator: torch.Generator, *, sdpa: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.epsilon, generator)
        self.self_attn = Attention(config, generator, sdpa=sdpa)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.epsilon, generator)
        self.mlp = GatedMLP(config, generator)

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's output `[batch, seq, hidden]`, key and value; arguments as of `Attention`."""
        attended, key, value = self.self_attn(self.input_layernorm(hidden), cos, sin, mask)
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), key, value


class DemoDecoder(nn.Module):
    """The bundled decoder with tied embeddings.

    Its random weights are scaled so that activations behave as in a trained model: embeddings
    N(0, 1); projections N(0, 1 / fan_in), so that queries, keys and values have unit variance
    and the scores a spread of about one; projections that write to the residual stream smaller
    by sqrt(2 * layers), so that the stream grows by less than a factor of two over all layers;
    norm gains 1 +- 0.1. The largest activation stays under 20, far from the end of fp16 at 65504.

    Args:
        config: sizes and seed. Torch's global generator is neither read nor advanced.
        sdpa: attention by `scaled_dot_product_attention` instead of written out.
    """

    def __init__(self, config: DemoConfig | None = None, *, sdpa: bool = False) -> None:
        super().__init__()
        self.config = config = config or DemoConfig()
        # torch's own initialisation, overwritten below, draws from the global generator.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            self._build(torch.Generator().manual_seed(config.seed), sdpa=sdpa)

    def _build(self, generator: torch.Generator, *, sdpa: bool) -> None:
        config = self.config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.embed_tokens.weight.copy_(torch.randn(config.vocabulary, config.hidden, generator=generator))
        self.rotary = RotaryEmbedding(config.head_dim, config.rotary_base)
        self.layers = nn.ModuleList(DecoderLayer(config, generator, sdpa=sdpa) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.epsilon, generator)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Runs the decoder.

        Args:
            input_ids: token ids, int64 `[batch, seq]`.
            attention_mask: int64 `[batch, seq]`, 1 for a token and 0 for padding on either side;
                None for no padding. Positions count tokens only.

        Returns:
            `keys` and `values` `[batch, layer, kv_head, seq, head_dim]`, `logits`
            `[batch, seq, vocabulary]`; what they hold at padding means nothing.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = embedding(input_ids, self.embed_tokens.weight)
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        cos, sin = self.rotary(position_ids, hidden.dtype)
        mask = additive_mask(attention_mask, hidden.dtype)
        keys, values = [], []
        for layer in self.layers:
            hidden, key, value = layer(hidden, cos, sin, mask)
            keys.append(key)
            values.append(value)
        # 1 / sqrt(hidden): the tied embeddings have unit variance, and so should the logits.
        logits = self.norm(hidden) @ self.embed_tokens.weight.T * self.config.hidden**-0.5
        return {"keys": torch.stack(keys, 1), "values": torch.stack(values, 1), "logits": logits}


def additive_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to the scores, `[batch, 1, seq, seq]` in `dtype`: 0 where a query may look,
    the lowest finite value where not (finite, so that a query that sees nothing gets no NaN)."""
    seq = attention_mask.shape[1]
    order = torch.arange(seq, device=attention_mask.device)
    seen = (order[None, :] <= order[:, None])[None, None] & attention_mask.bool()[:, None, None, :]
    lowest = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=attention_mask.device)
    return torch.where(seen, torch.zeros((), dtype=dtype, device=attention_mask.device), lowest)
