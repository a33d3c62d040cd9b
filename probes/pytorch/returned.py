"""Keys and values in what a model returns: in caches, layer by layer, or stacked."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from divergence.sites import HEAD_AXES
from divergence.stacked import role

REPEATED = re.compile(
    r"^(past_key_values?|presents?|hidden_states|attentions|encoder_hidden_states"
    r"|encoder_attentions|decoder_hidden_states|decoder_attentions|cross_attentions)\."
)
"""Leaves of a model's output that usually repeat what the sites hold."""

# `key_values` is one word: the cache, not one of its halves.
_CACHE = re.compile(r"key_?values?(?=$|[^A-Za-z])", re.IGNORECASE)
_WORDS = re.compile(r"[A-Za-z]+|\d+")
_TENSORS = {"key": "key", "keys": "key", "k": "key", "value": "value", "values": "value", "v": "value"}
_CROSS = frozenset({"encoder", "cross"})
_BY_PLACE = ("key", "value", "cross_key", "cross_value")
_PLACED = re.compile(r"(?:^|\.)(?P<layer>\d+)\.(?P<place>[0-3])$")


@dataclass(frozen=True)
class ByLayer:
    """Keys, or values, of the layers of one stack.

    Attributes:
        name: of the output, with `*` for the index of the layer.
        tensor: of the site.
        layers: by index; a layer without attention may be absent.
        count: of all layers.
        aside: whether nothing else compares them: they are no outputs of their own.
    """

    name: str
    tensor: str
    layers: Mapping[int, Tensor]
    count: int
    aside: bool


@dataclass(frozen=True)
class Stacked:
    """Keys, or values, of all layers in one tensor.

    Attributes:
        name: of the output.
        tensor: of the site.
        layers: one axis goes over the layers.
    """

    name: str
    tensor: str
    layers: Tensor


def leaves(outputs: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What a model's output is made of, by dotted name: tensors, and whatever else is no container."""
    if isinstance(outputs, Tensor):
        items = None
    elif isinstance(outputs, Mapping):
        items = list(outputs.items())
    elif hasattr(outputs, "_fields"):
        items = list(zip(outputs._fields, outputs, strict=True))
    elif isinstance(outputs, tuple | list):
        items = [(str(i), value) for i, value in enumerate(outputs)]
    elif dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        items = [(f.name, getattr(outputs, f.name)) for f in dataclasses.fields(outputs)]
    else:
        items = None
    if items is None:
        yield prefix.rstrip(".") or "0", outputs
        return
    for name, value in items:
        yield from leaves(value, f"{prefix}{name}.")


def keys_by_layer(outputs: Any) -> list[ByLayer]:
    """Keys and values that a model returns layer by layer: in caches of transformers, in a tuple of
    pairs, or each as an output that is named after its layer."""
    found: list[ByLayer] = []
    groups: dict[tuple[str, str], dict[int, Tensor]] = {}
    for name, leaf in leaves(outputs):
        if not isinstance(leaf, Tensor):
            found.extend(_in_cache(name, leaf))
            continue
        place = _place(name) if leaf.dim() == len(HEAD_AXES) else None
        if place is not None:
            layer, tensor, pattern = place
            groups.setdefault((pattern, tensor), {})[layer] = leaf
    for (pattern, tensor), layers in groups.items():
        if sorted(layers) == list(range(len(layers))):
            aside = REPEATED.match(f"{pattern}.") is not None
            found.append(ByLayer(pattern, tensor, layers, len(layers), aside))
    return found


def keys_stacked(outputs: Any) -> list[Stacked]:
    """Keys and values that a model returns in one tensor of all layers, by the output's name."""
    found = []
    for name, leaf in leaves(outputs):
        if not isinstance(leaf, Tensor) or leaf.dim() != len(HEAD_AXES) + 1:
            continue
        tensors = [tensor for tensor in role(name) if tensor != "hidden"]
        if len(tensors) == 1:
            found.append(Stacked(name, tensors[0], leaf))
    return found


def _in_cache(name: str, cache: Any) -> Iterator[ByLayer]:
    """What a cache of transformers holds; nothing where `cache` is none."""
    for part, prefix in (("self_attention_cache", ""), ("cross_attention_cache", "cross_")):
        layers = getattr(getattr(cache, part, None), "layers", None)
        if part == "self_attention_cache" and layers is None:
            layers = getattr(cache, "layers", None)
        if not isinstance(layers, Sequence):
            continue
        for tensor in ("key", "value"):
            held = {i: getattr(layer, f"{tensor}s", None) for i, layer in enumerate(layers)}
            tensors = {i: t for i, t in held.items() if isinstance(t, Tensor)}
            yield ByLayer(name, f"{prefix}{tensor}", tensors, len(layers), aside=True)


def _place(name: str) -> tuple[int, str, str] | None:
    """Layer and tensor that the name of a leaf says it is, and the name without the layer; or None.

    `present.3.key` -> (3, "key", "present.*.key"); `past_key_values.3.1` -> (3, "value", ...).
    """
    words = _WORDS.findall(_CACHE.sub("cache", name).lower())
    tensors = [_TENSORS[word] for word in words if word in _TENSORS]
    placed = _PLACED.search(name)
    if placed is not None and not tensors:
        pattern = f"{name[: placed.start('layer')]}*.{placed['place']}"
        return int(placed["layer"]), _BY_PLACE[int(placed["place"])], pattern
    numbers = list(re.finditer(r"\d+", name))
    if len(tensors) != 1 or not numbers:
        return None
    last = numbers[-1]
    tensor = f"cross_{tensors[0]}" if _CROSS & set(words) else tensors[0]
    return int(last[0]), tensor, f"{name[: last.start()]}*{name[last.end() :]}"
