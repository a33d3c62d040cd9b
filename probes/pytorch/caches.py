"""Keys and values in the caches of transformers, whichever of its classes holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn


def caches_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The caches of transformers among a layer's arguments."""
    return [
        value
        for value in (*args, *kwargs.values())
        if not isinstance(value, Tensor | nn.Module)
        and (hasattr(value, "layers") or hasattr(value, "self_attention_cache"))
    ]


def cached(caches: Sequence[Any], layer: int | None, tensor: str) -> Tensor | None:
    """The tensor that a cache of transformers holds for `layer`, or None."""
    for entry in _entries(caches, layer, tensor):
        held = getattr(entry, f"{tensor.removeprefix('cross_')}s", None)
        if isinstance(held, Tensor) and held.dim() == 4:
            return held
    return None


def is_repeated(held: Tensor, seen: Tensor) -> bool:
    """Whether `seen` has the shape of `held` with its heads repeated, or not even that."""
    (batch, heads, *rest), (seen_batch, seen_heads, *seen_rest) = held.shape, seen.shape
    return batch == seen_batch and rest == seen_rest and heads > 0 and seen_heads % heads == 0


def put_cached(caches: Sequence[Any], layer: int, tensor: str, value: Tensor) -> None:
    """Replaces what the caches hold for `layer` by a copy of `value`, where they hold a tensor of its
    shape."""
    for entry in _entries(caches, layer, tensor):
        held = getattr(entry, f"{tensor}s", None)
        if isinstance(held, Tensor) and held.shape == value.shape:
            setattr(entry, f"{tensor}s", value.to(held.device, copy=True))


def _entries(caches: Sequence[Any], layer: int | None, tensor: str) -> Iterator[Any]:
    """What each cache of transformers holds for `layer`."""
    kind = "cross_attention_cache" if tensor.startswith("cross_") else "self_attention_cache"
    for cache in caches:
        layers = getattr(getattr(cache, kind, cache), "layers", None)
        if isinstance(layers, Sequence) and layer is not None and layer < len(layers):
            yield layers[layer]
