"""The language stack of the case study, at a small and at its full size, with random weights.

Gated MLP, grouped-query attention with one key head, RMSNorm, rotary angles computed in the graph from
the positions that it is given. What `export` writes returns the keys and values of all layers stacked,
and the last hidden states, as the team's own wrapper did.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_SMALL = 1024
"""Elements of constants that are folded."""


@dataclass(frozen=True)
class Size:
    """Sizes of the stack; `heads` query heads share one key head."""

    layers: int
    hidden: int
    heads: int
    head_dim: int
    mlp: int
    tokens: int


SIZES = {
    "small": Size(layers=8, hidden=512, heads=8, head_dim=64, mlp=2048, tokens=256),
    "full": Size(layers=18, hidden=2048, heads=8, head_dim=256, mlp=16384, tokens=970),
}


def projection(fan_in: int, fan_out: int, gain: float = 1.0) -> nn.Linear:
    """A projection with weights N(0, gain^2 / fan_in)."""
    linear = nn.Linear(fan_in, fan_out, bias=False)
    nn.init.normal_(linear.weight, std=gain * fan_in**-0.5)
    return linear


class Norm(nn.Module):
    """RMSNorm with its statistics in fp32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1.0 + 0.1 * torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `[..., size]`."""
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (scaled * self.weight.float()).to(x.dtype)


class Attention(nn.Module):
    """Explicit attention: product, mask, softmax, product."""

    def __init__(self, size: Size, gain: float) -> None:
        super().__init__()
        self.size = size
        self.q_proj = projection(size.hidden, size.heads * size.head_dim)
        self.k_proj = projection(size.hidden, size.head_dim)
        self.v_proj = projection(size.hidden, size.head_dim)
        self.o_proj = projection(size.heads * size.head_dim, size.hidden, gain)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output `[1, token, hidden]`, the rotated key and the value `[1, 1, token, head_dim]`."""
        batch, tokens, _ = x.shape
        query, key, value = (
            layer(x).view(batch, tokens, -1, self.size.head_dim).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        repeated = [t.expand(-1, self.size.heads, -1, -1) for t in (key, value)]
        scores = torch.matmul(query, repeated[0].transpose(2, 3)) * self.size.head_dim**-0.5 + mask
        weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        mixed = torch.matmul(weights, repeated[1]).transpose(1, 2).reshape(batch, tokens, -1)
        return self.o_proj(mixed), key, value


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding, halves apart."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Mlp(nn.Module):
    """Gated MLP with tanh-approximated GELU."""

    def __init__(self, size: Size, gain: float) -> None:
        super().__init__()
        self.gate_proj = projection(size.hidden, size.mlp)
        self.up_proj = projection(size.hidden, size.mlp)
        self.down_proj = projection(size.mlp, size.hidden, gain)

    def forward(self, x: Tensor) -> Tensor:
        """`[1, token, hidden]` in and out."""
        gate = functional.gelu(self.gate_proj(x), approximate="tanh")
        result: Tensor = self.down_proj(gate * self.up_proj(x))
        return result


class Layer(nn.Module):
    """Norm, attention, norm, MLP, with residuals."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        gain = (2 * size.layers) ** -0.5  # keeps the residual stream of order one
        self.input_layernorm = Norm(size.hidden)
        self.self_attn = Attention(size, gain)
        self.post_attention_layernorm = Norm(size.hidden)
        self.mlp = Mlp(size, 2 * gain)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's output, its key and its value."""
        mixed, key, value = self.self_attn(self.input_layernorm(x), cos, sin, mask)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), key, value


class Stack(nn.Module):
    """The whole stack."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        half = torch.arange(0, size.head_dim, 2, dtype=torch.float32) / size.head_dim
        self.register_buffer("inv_freq", 10000.0**-half, persistent=False)
        self.inv_freq: Tensor

    def forward(self, x: Tensor, position_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values `[1, layer, 1, token, head_dim]`, and the last hidden states.

        Args:
            x: `[1, token, hidden]`.
            position_ids: `[1, token]`, int64.
            mask: `[1, 1, token, token]`, added to the scores.
        """
        angles = position_ids[:, :, None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        keys, values = [], []
        for layer in self.layers:
            x, key, value = layer(x, cos, sin, mask)
            keys.append(key)
            values.append(value)
        return torch.stack(keys, dim=1), torch.stack(values, dim=1), x


def make(size: str, device: str = "cuda", seed: int = 0) -> Stack:
    """The stack in fp32, random weights from `seed`; those of the small size are the same everywhere."""
    torch.manual_seed(seed)
    with torch.device("cpu" if size != "full" else device):
        return Stack(SIZES[size]).eval().to(device)


def small() -> Stack:
    """For `--ref pytorch:benchmarks/tensorrt/gemma.py:small`."""
    return make("small")


def full() -> Stack:
    """For `--ref pytorch:benchmarks/tensorrt/gemma.py:full`."""
    return make("full")


def inputs(size: str, seed: int = 1) -> dict[str, Tensor]:
    """Inputs: unit-variance embeddings, positions from 0, nothing masked (a prefix sees all of itself)."""
    generator = torch.Generator().manual_seed(seed)
    tokens, hidden = SIZES[size].tokens, SIZES[size].hidden
    return {
        "x": torch.randn(1, tokens, hidden, generator=generator),
        "position_ids": torch.arange(tokens)[None],
        "mask": torch.zeros(1, 1, tokens, tokens),
    }


def halved(model: Stack) -> Stack:
    """The stack with weights in fp16; the rotary angles and norms still compute in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.half()
    return model


def export(model: Stack, given: dict[str, Tensor], path: Path) -> Path:
    """Writes the ONNX model, its weights beside it.

    Of the exporter's own optimisation only the folding of small constants is run, which TensorRT's parser
    needs (axes must be initializers); TensorRT repeats the rest, and on 2 G parameters it takes minutes.
    """
    from onnxscript import optimizer  # takes seconds, and who only runs the stack needs it not

    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    moved = {n: t.to(device, dtype if t.is_floating_point() else None) for n, t in given.items()}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            model,
            kwargs=moved,
            dynamo=True,
            optimize=False,
            output_names=["keys", "values", "hidden_states"],
        )
    optimizer.fold_constants(program.model, input_size_limit=_SMALL, output_size_limit=_SMALL)
    optimizer.remove_unused_nodes(program.model)
    program.save(path, external_data=True)
    return path


def tiny(tokens: int = 64) -> tuple[Stack, dict[str, Tensor]]:
    """Two layers on the CPU, for trying scripts out."""
    size = replace(SIZES["small"], layers=2, hidden=64, heads=2, head_dim=32, mlp=128, tokens=tokens)
    SIZES["tiny"] = size
    return make("tiny", "cpu"), inputs("tiny")
