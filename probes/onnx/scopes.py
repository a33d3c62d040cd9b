"""Which module every node of an ONNX graph belongs to, and which layers there are.

Scopes come from the metadata that the dynamo exporter leaves on nodes, or from the node names of
the TorchScript exporter (`/model/layers.0/self_attn/MatMul`).
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from divergence.sites import name_stacks

if TYPE_CHECKING:
    from onnx import NodeProto

_SCOPES = "pkg.torch.onnx.name_scopes"
_NUMBERED = re.compile(r"^(?P<stem>.*?[A-Za-z])_?(?P<index>\d+)$")
_CALL = re.compile(r"@(\d+)$")


def node_scopes(
    nodes: Sequence[NodeProto],
    producer: Callable[[str], int | None],
    consumers: Callable[[str], list[int]],
) -> list[str | None]:
    """The path of the innermost module of each node; None where nothing shows it.

    A node without a scope of its own (exporters add some) belongs to the innermost module that
    holds both what it reads and what reads it.
    """
    scopes = [_own_scope(node) for node in nodes]
    if not any(scopes):
        return scopes
    for index, node in enumerate(nodes):
        if scopes[index] is not None:
            continue
        made = [producer(name) for name in node.input if name]
        around = {scopes[i] for i in made if i is not None}
        around |= {scopes[i] for name in node.output for i in consumers(name)}
        known = [scope.split(".") for scope in around if scope is not None]
        if known:
            scopes[index] = ".".join(_shared(known))
    return scopes


def origin(nodes: Sequence[NodeProto]) -> str:
    """Where scopes of these nodes come from, in words."""
    for node in nodes:
        if any(p.key in (_SCOPES, "namespace") for p in node.metadata_props):
            return "exporter metadata"
    return "node names"


def _own_scope(node: NodeProto) -> str | None:
    metadata = {p.key: p.value for p in node.metadata_props}
    if _SCOPES in metadata:
        try:
            names = ast.literal_eval(metadata[_SCOPES])
        except (ValueError, SyntaxError):
            names = []
        if len(names) > 1:
            return str(names[-2])
    if "namespace" in metadata:
        names = [part.split(":")[0].strip() for part in metadata["namespace"].split("/")]
        if len(names) > 1:
            return str(names[-2])
    if node.name.startswith("/"):
        return ".".join(part for part in node.name.split("/")[1:-1] if part)
    return None


def _shared(paths: Sequence[Sequence[str]]) -> list[str]:
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return shared


@dataclass(frozen=True)
class Layer:
    """One layer of a stack, called once.

    Attributes:
        stack: name of the stack.
        index: index of the layer.
        call: which call of it.
        path: path of its module.
        nodes: indices of its nodes in topological order.
    """

    stack: str
    index: int
    call: int
    path: str
    nodes: tuple[int, ...]

    def inner(self, scope: str | None) -> str:
        """`scope` relative to the layer: empty for the layer itself."""
        return (scope or "")[len(self.path) :].lstrip(".")


def find_layers(scopes: Sequence[str | None], known: Mapping[str, int] | None = None) -> list[Layer]:
    """The layers of the outermost stacks of composite modules, in execution order.

    Args:
        scopes: path of the innermost module of each node.
        known: number of layers of each stack of a reference; where stacks are called differently
            here (an export of the decoder alone), its names are taken.
    """
    inside: dict[tuple[str, int], set[str]] = defaultdict(set)
    for scope in dict.fromkeys(scopes):
        for prefix, index, rest in _numbered(scope or ""):
            inside[prefix, index].add(rest)
    stacks = _accepted(inside)
    nodes: dict[tuple[str, int, int, str], list[int]] = defaultdict(list)
    for at, scope in enumerate(scopes):
        for prefix, index, rest in _numbered(scope or ""):
            if prefix in stacks:
                path = (scope or "")[: len(scope or "") - len(rest)].rstrip(".")
                call = _CALL.search(path)
                nodes[prefix, index, int(call[1]) + 1 if call else 1, path].append(at)
                break
    paths = dict.fromkeys(prefix for prefix, *_ in nodes)
    counts = {path: len({key[1] for key in nodes if key[0] == path}) for path in paths}
    named = name_stacks(path.rstrip("#") for path in paths)
    names = _reconciled({path: named[path.rstrip("#")] for path in paths}, counts, known or {})
    # A stack runs when its first layer is done: a few of its nodes may stand far ahead of that.
    done: dict[str, int] = {}
    for (prefix, *_), found in sorted(nodes.items(), key=lambda item: item[0][1:3]):
        done.setdefault(prefix, found[-1])
    layers = [
        Layer(names[prefix], index, call, path, tuple(found))
        for (prefix, index, call, path), found in nodes.items()
    ]
    order = {names[prefix]: at for prefix, at in done.items()}
    return sorted(layers, key=lambda layer: (order[layer.stack], layer.call, layer.index))


def _numbered(scope: str) -> list[tuple[str, int, str]]:
    """Every reading of `scope` as layer of a stack: path of the stack, index, path inside the
    layer; the outermost first."""
    parts = scope.split(".")
    readings = []
    for at, part in enumerate(parts):
        name = _CALL.sub("", part)
        rest = ".".join(parts[at + 1 :])
        if name.isdigit():
            readings.append((_CALL.sub("", ".".join(parts[:at])), int(name), rest))
        elif match := _NUMBERED.match(name):
            stem = ".".join([*parts[:at], match["stem"]])
            readings.append((f"{stem}#", int(match["index"]), rest))
    return readings


def _accepted(inside: Mapping[tuple[str, int], set[str]]) -> set[str]:
    """Paths of stacks all of whose layers are composite. Numbered attributes (`block0`, marked
    `#`) must be several to be a stack."""
    layers: dict[str, list[set[str]]] = defaultdict(list)
    for (prefix, _), rests in inside.items():
        layers[prefix].append({rest for rest in rests if rest})
    return {
        prefix
        for prefix, found in layers.items()
        if all(len(rests) > 1 for rests in found) and (len(found) > 1 or not prefix.endswith("#"))
    }


def _reconciled(names: dict[str, str], counts: Mapping[str, int], known: Mapping[str, int]) -> dict[str, str]:
    """Calls stacks as the reference does, where its names differ and which is which is plain."""
    if not known or set(names.values()) <= set(known):
        return names
    renamed = dict(names)
    for path in names:
        parts = path.rstrip("#").split(".")
        same = [name for name, count in known.items() if name and count == counts[path] and name in parts]
        same = same or [name for name, count in known.items() if count == counts[path]]
        if len(same) == 1 and same[0] not in renamed.values():
            renamed[path] = same[0]
    return renamed
