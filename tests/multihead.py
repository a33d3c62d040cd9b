"""Models of `nn.MultiheadAttention`, and the same written by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, TOKENS = 32, 4, 6


class Layer(nn.Module):
    """Attends to itself, and to `memory` if there is any."""

    def __init__(self, *, batch_first: bool, weights: bool, memory: int = 0) -> None:
        super().__init__()
        sides = {"kdim": memory, "vdim": memory} if memory else {}
        self.norm = nn.LayerNorm(WIDTH)
        self.self_attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
        self.cross_attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **sides)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.weights = weights

    def forward(self, x: Tensor, mask: Tensor, padding: Tensor | None, memory: Tensor | None) -> Tensor:
        read = self.norm(x)
        given: dict[str, Any] = {"attn_mask": mask, "key_padding_mask": padding}
        x = x + self.self_attn(read, read, read, need_weights=self.weights, **given)[0]
        if memory is not None:
            x = x + self.cross_attn(self.norm(x), memory, memory, need_weights=self.weights)[0]
        made: Tensor = x + self.mlp(self.norm(x))
        return made


class Heads(nn.Module):
    """Three causal layers of `[batch, token, channel]`, or with the token first inside."""

    def __init__(self, *, batch_first: bool = True, weights: bool = False, memory: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Layer(batch_first=batch_first, weights=weights, memory=memory) for _ in range(3)
        )
        self.batch_first = batch_first
        spread(self)

    def forward(self, x: Tensor, padding: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        if not self.batch_first:
            x, memory = x.transpose(0, 1), None if memory is None else memory.transpose(0, 1)
        for layer in self.layers:
            x = layer(x, mask, padding, memory)
        return x if self.batch_first else x.transpose(0, 1)


class Ported(nn.Module):
    """`Heads` with its attention written by hand.

    Args:
        model: whose weights it has.
        scale: factor on the scores of the layer `at`.
        ahead: how many later tokens its queries see.
        softmax: what its softmax runs in.
        at: the layer with these faults.
    """

    def __init__(
        self,
        model: Heads,
        *,
        scale: float = 1.0,
        ahead: int = 0,
        softmax: torch.dtype = torch.float32,
        at: int = 1,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            _Written(layer, *((scale, ahead, softmax) if i == at else (1.0, 0, torch.float32)))
            for i, layer in enumerate(model.layers)
        )

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, padding)
        return x


class _Written(nn.Module):
    def __init__(self, layer: Any, scale: float, ahead: int, softmax: torch.dtype) -> None:
        super().__init__()
        own = layer.self_attn
        self.norm, self.mlp, self.out = layer.norm, layer.mlp, own.out_proj
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.qkv.load_state_dict({"weight": own.in_proj_weight, "bias": own.in_proj_bias})
        self.scale, self.ahead, self.softmax = scale * (WIDTH // HEADS) ** -0.5, ahead, softmax

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        projected = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1))
        q, k, v = (projected[:, :, i].transpose(1, 2) for i in range(3))
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1 + self.ahead)
        hidden = hidden if padding is None else hidden | padding[:, None, None, :]
        scores = (q @ k.transpose(-1, -2) * self.scale).masked_fill(hidden, -torch.inf)
        mixed = functional.softmax(scores.to(self.softmax), -1).to(v.dtype) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        made: Tensor = x + self.mlp(self.norm(x))
        return made


def spread(model: nn.Module) -> Any:
    """Weights, gains and biases at random, none of them zero or one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            gain = "norm" in name and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size + gain)
    return model.eval()


def given(*, padded: bool = False, memory: int = 0, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Two sequences, the first with two padded tokens, and what they attend to, of `memory` channels."""
    generator = torch.Generator().manual_seed(3)
    inputs = {"x": torch.randn(2, tokens, WIDTH, generator=generator)}
    if padded:
        inputs["padding"] = torch.zeros(2, tokens, dtype=torch.bool)
        inputs["padding"][0, -2:] = True
    if memory:
        inputs["memory"] = torch.randn(2, 9, memory, generator=generator)
    return inputs
