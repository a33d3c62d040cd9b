"""Fewer bits, as deployments plant them: rounded tensors, products of such, modules in half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from divergence.emulation import cast

Change = Callable[[Tensor], Tensor]


def integers(axes: int | tuple[int, ...], largest: int = 127) -> Change:
    """Symmetric integers with one step for what lies along `axes`."""

    def change(tensor: Tensor) -> Tensor:
        step = tensor.abs().amax(axes, keepdim=True) / largest
        return (tensor / step).round() * step

    return change


def floats(axes: int | tuple[int, ...], dtype: torch.dtype = torch.float8_e4m3fn) -> Change:
    """8-bit floats with one scale for what lies along `axes`."""

    def change(tensor: Tensor) -> Tensor:
        scale = tensor.abs().amax(axes, keepdim=True) / torch.finfo(dtype).max
        return (tensor / scale).to(dtype).to(tensor.dtype) * scale

    return change


def round_products(module: nn.Module, inputs: Change, weights: Change) -> None:
    """Has a linear layer multiply rounded inputs with rounded weights; others are left alone."""
    if not isinstance(module, nn.Linear):
        return

    def forward(x: Tensor) -> Tensor:
        return functional.linear(inputs(x), weights(module.weight), module.bias)

    setattr(module, "forward", forward)  # noqa: B010 - for mypy


def in_half(module: nn.Module) -> None:
    """Has a module compute in bf16, between what is fp32."""
    module.to(torch.bfloat16)
    forward = module.forward

    def converted(*args: Any, **kwargs: Any) -> Any:
        return forward(*cast(args, "bf16"), **cast(kwargs, "bf16")).float()

    setattr(module, "forward", converted)  # noqa: B010 - for mypy
