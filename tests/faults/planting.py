"""What a planted fault is, and the ways to plant one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.faults.models import Decoder

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


def layers_of(model: Decoder, draw: np.random.Generator, where: int | str | None) -> list[int]:
    if where == "all":
        return list(range(model.shape.layers))
    if where == "from":
        return list(range(drawn(model, draw, None), model.shape.layers))
    assert not isinstance(where, str)
    return [drawn(model, draw, where)]


def changed(
    cause: str, part: str, change: Callable[[Tensor], Tensor], where: int | str | None, **parameters: Any
) -> Fault:
    """The weights of `part` replaced by `change` of them in one layer, all, or all `from` one on."""

    def plant(model: Decoder, draw: np.random.Generator) -> tuple[nn.Module, tuple[Planted, ...]]:
        made = copy.deepcopy(model)
        layers = layers_of(model, draw, where)
        for layer in layers:
            weight, _ = made.block(layer).part(part)
            weight.copy_(change(weight))
        return made, (Planted(site_of(layers[0], part), cause, {"layer": layers[0], **parameters}),)

    return plant


def switched(
    cause: str,
    tensor: str,
    apply: Callable[[Any], None],
    where: int | str | None,
    **parameters: Any,
) -> Fault:
    """`apply` called on the blocks of one layer or all; the first site is `tensor` of the first."""

    def plant(model: Decoder, draw: np.random.Generator) -> tuple[nn.Module, tuple[Planted, ...]]:
        made = copy.deepcopy(model)
        layers = layers_of(model, draw, where)
        for layer in layers:
            apply(made.block(layer))
        return made, (Planted(f"layers.{layers[0]}.{tensor}", cause, {"layer": layers[0], **parameters}),)

    return plant


def setting(path: str, value: Any) -> Callable[[Any], None]:
    *owners, name = path.split(".")

    def apply(module: Any) -> None:
        for owner in owners:
            module = getattr(module, owner)
        setattr(module, name, value)

    return apply


def whole(site: str, cause: str, apply: Callable[[Any], None], **parameters: Any) -> Fault:
    """`apply` called on the model."""

    def plant(model: Decoder, draw: np.random.Generator) -> tuple[nn.Module, tuple[Planted, ...]]:
        made = copy.deepcopy(model)
        apply(made)
        return made, (Planted(site, cause, parameters),)

    return plant
