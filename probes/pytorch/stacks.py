"""Finds the layer stacks of a module by structure: lists of repeated composite modules."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from divergence.sites import name_stacks

_Test = Callable[[nn.Module], bool]

_NUMBERED = re.compile(r"^(?P<stem>.*?)_?(?P<index>\d+)$")


@dataclass(frozen=True)
class Stack:
    """Layers that a model runs one after another.

    Attributes:
        name: as sites call it; "" where the model has a single stack.
        path: module path of the list that holds the layers.
        layers: the layers in order.
    """

    name: str
    path: str
    layers: tuple[nn.Module, ...]


def find_stacks(model: nn.Module) -> tuple[Stack, ...]:
    """The outermost layer stacks of `model`, in the order of registration.

    A stack is a `ModuleList` of composite modules, or a `Sequential` or a set of numbered
    attributes (`block0`, `block1`) of at least two composites of one class. What lies inside a
    stack's layers (experts, blocks of a stage) is not looked at. Where a model has none, blocks that
    hold all of their weights themselves count as composite.
    """
    found = dict(_search(model, "", _is_composite)) or dict(_search(model, "", _is_block))
    names = name_stacks(found)
    return tuple(Stack(names[path], path, layers) for path, layers in found.items())


def _search(module: nn.Module, path: str, is_layer: _Test) -> Iterator[tuple[str, tuple[nn.Module, ...]]]:
    layers = _listed(module, is_layer)
    if layers:
        yield path, layers
        return
    numbered = _numbered(module, is_layer)
    taken = {id(layer) for group in numbered.values() for layer in group}
    for stem, group in numbered.items():
        yield f"{path}.{stem}".lstrip("."), group
    for name, child in module.named_children():
        if id(child) not in taken:
            yield from _search(child, f"{path}.{name}".lstrip("."), is_layer)


def _listed(module: nn.Module, is_layer: _Test) -> tuple[nn.Module, ...]:
    layers = tuple(module.children())
    alike = len(layers) > 1 and len({type(x) for x in layers}) == 1
    may_be = isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and alike)
    return layers if may_be and all(is_layer(layer) for layer in layers) else ()


def _numbered(module: nn.Module, is_layer: _Test) -> dict[str, tuple[nn.Module, ...]]:
    if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
        return {}
    groups: dict[tuple[str, type[nn.Module]], list[tuple[int, nn.Module]]] = {}
    for name, child in module.named_children():
        match = _NUMBERED.match(name)
        if match and match["stem"] and is_layer(child):
            groups.setdefault((match["stem"], type(child)), []).append((int(match["index"]), child))
    return {
        stem: tuple(layer for _, layer in sorted(group, key=lambda item: item[0]))
        for (stem, _), group in groups.items()
        if len(group) > 1
    }


def _is_composite(module: nn.Module) -> bool:
    """Whether `module` is more than a single operator: two modules in it own parameters."""
    owners = (1 for inner in module.modules() if next(inner.parameters(recurse=False), None) is not None)
    return sum(itertools.islice(owners, 2)) == 2


def _is_block(module: nn.Module) -> bool:
    """Whether `module` owns the weights of several operators: two matrices or more, and it is none of
    torch's own modules."""
    matrices = [weight for weight in module.parameters(recurse=False) if weight.dim() > 1]
    return len(matrices) > 1 and not type(module).__module__.startswith("torch.nn.")
