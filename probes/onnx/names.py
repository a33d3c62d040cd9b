"""Sites that a graph declares: outputs called `present.3.key`, `past_key_values.3.value`, ..."""

from __future__ import annotations

import re
from collections.abc import Sequence

from divergence.errors import ConfigurationError
from divergence.probes.onnx.found import Found
from divergence.probes.onnx.graph import Graph
from divergence.probes.onnx.scopes import Layer
from divergence.sites import HEAD_AXES, Site

# `key_values` is one word: the cache, not one of its halves.
_CACHE = re.compile(r"key_?values?(?=$|[^A-Za-z])", re.IGNORECASE)
_WORDS = re.compile(r"[A-Za-z]+|\d+")
_TENSORS = {"key": "key", "keys": "key", "k": "key", "value": "value", "values": "value", "v": "value"}
_CACHES = frozenset({"present", "past", "cache"})
_CROSS = frozenset({"encoder", "cross"})


def declared_tensor(name: str) -> tuple[int, str] | None:
    """Layer and tensor that the output `name` says it is, or None.

    `present.3.key` -> (3, "key"); `present.3.encoder.value` -> (3, "cross_value").
    """
    words = _WORDS.findall(_CACHE.sub("cache", name).lower())
    indices = [word for word in words if word.isdigit()]
    tensors = [_TENSORS[word] for word in words if word in _TENSORS]
    if len(indices) != 1 or len(tensors) != 1 or not _CACHES & set(words):
        return None
    return int(indices[0]), f"cross_{tensors[0]}" if _CROSS & set(words) else tensors[0]


def declared_sites(graph: Graph, layers: Sequence[Layer], stacks: Sequence[str]) -> list[Found]:
    """The sites that output names declare.

    Args:
        graph: the graph.
        layers: its layers, as far as scopes show them: they tell the stack.
        stacks: names of stacks that hold keys and values; the last is taken where scopes do not
            tell.
    """
    stack_of = {index: layer.stack for layer in layers for index in layer.nodes}
    found = []
    for name in graph.outputs:
        if site := site_named(name):
            found.append(Found(site, name, site.axes, f"output named {name}", "name"))
            continue
        declared = declared_tensor(name)
        if declared is None or graph.rank(name) not in (4, None):
            continue
        producer = graph.producer(name)
        stack = stack_of.get(-1 if producer is None else producer, stacks[-1] if stacks else "")
        site = Site(*declared, stack)
        found.append(Found(site, name, HEAD_AXES, f"output named {name}", "name"))
    return found


def site_named(name: str) -> Site | None:
    """The layer's site that `name` spells out, or None."""
    try:
        site = Site.parse(name)
    except ConfigurationError:
        return None
    return site if site.layer is not None else None
