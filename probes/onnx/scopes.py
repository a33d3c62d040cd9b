"""Which module every node of an ONNX graph belongs to, and which layers there are.

Scopes come from the metadata that the dynamo exporter leaves on nodes, or from the node names of
the TorchScript exporter (`/model/layers.0/self_attn/MatMul`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from divergence.probes.onnx.calls import split_calls
from divergence.sites import name_stacks

if TYPE_CHECKING:
    from onnx import NodeProto

_SCOPES = "pkg.torch.onnx.name_scopes"
_TRACE = "pkg.torch.onnx.stack_trace"
# Names in a list as Python writes it. `ast` reads that too, but two threads that parse at once end in a
# SystemError in some versions of Python (gh-106905), and one model is loaded while another runs.
_QUOTED = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"")
_ESCAPED = re.compile(r"\\(.)")
_NUMBERED = re.compile(r"^(?P<stem>.*?[A-Za-z])_?(?P<index>\d+)$")
# A module's later calls: `layers.0@1` in metadata; `layers.0_1`, `layers.0/norm_1` in node names.
_CALL = re.compile(r"@\d+(?=\.|$)|(?<=\.\d)_\d+(?=\.|$)|(?<=\.\d\d)_\d+(?=\.|$)")
_REPEATED = re.compile(r"_\d+(?=\.|$)")


def node_scopes(
    nodes: Sequence[NodeProto],
    producer: Callable[[str], int | None],
    consumers: Callable[[str], list[int]],
) -> list[str | None]:
    """The path of the innermost module of each node; None where nothing shows it.

    A node without a scope of its own (exporters add some) belongs to the innermost module that
    holds both what it reads and what reads it.
    """
    own = (_own_scope(node) for node in nodes)
    scopes = [None if scope is None else _CALL.sub("", scope) for scope in own]
    if not any(scopes):
        return scopes
    for index, node in enumerate(nodes):
        if scopes[index] is not None:
            continue
        made = [producer(name) for name in node.input if name]
        around = {scopes[i] for i in made if i is not None}
        if not any(around):
            continue  # what depends on weights alone may serve several modules
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


def same_call(first: NodeProto, second: NodeProto) -> bool | None:
    """Whether two nodes were exported from one call of an operator of torch, as the parts of
    `scaled_dot_product_attention` are; None if only the line of source that both stand for is the same,
    or nothing is known of them."""
    names = [_path(node) for node in (first, second)]
    if all(names) and names[0] == names[1]:
        return True
    lines = [p.value for node in (first, second) for p in node.metadata_props if p.key == _TRACE]
    return None if len(set(lines)) < 2 else False


def _path(node: NodeProto) -> list[str]:
    """The modules around `node`, and last what it was exported from; empty where nothing shows it."""
    metadata = {p.key: p.value for p in node.metadata_props}
    names: list[str] = []
    if _SCOPES in metadata:
        quoted = _QUOTED.findall(metadata[_SCOPES])
        names = [_ESCAPED.sub(r"\1", single or double) for single, double in quoted]
    if len(names) < 2 and "namespace" in metadata:
        names = [part.split(":")[0].strip() for part in metadata["namespace"].split("/")]
    return names if len(names) > 1 else []


def _own_scope(node: NodeProto) -> str | None:
    if names := _path(node):
        return names[-2]
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


def find_layers(
    scopes: Sequence[str | None],
    kinds: Sequence[str] = (),
    known: Mapping[str, int] | None = None,
    fixed: Sequence[bool] = (),
    times: Callable[[Sequence[int]], int] = lambda _: 1,
) -> list[Layer]:
    """The layers of the outermost stacks of composite modules, in execution order.

    Args:
        scopes: path of the innermost module of each node.
        kinds: operator of each node, by which calls of one layer are told apart.
        known: number of layers of each stack of a reference; where stacks are called differently
            here (an export of the decoder alone), its names are taken.
        fixed, times: see `divergence.probes.onnx.calls.split_calls`.
    """
    inside: dict[tuple[str, int], set[str]] = defaultdict(set)
    for scope in dict.fromkeys(scopes):
        for prefix, index, rest in _numbered(scope or ""):
            inside[prefix, index].add(rest)
    stacks = _accepted(inside)
    nodes: dict[str, dict[int, list[int]]] = {}
    paths: dict[tuple[str, int], str] = {}
    for at, scope in enumerate(scopes):
        for prefix, index, rest in _numbered(scope or ""):
            if prefix in stacks:
                nodes.setdefault(prefix, {}).setdefault(index, []).append(at)
                paths[prefix, index] = (scope or "")[: len(scope or "") - len(rest)].rstrip(".")
                break
    names = _named(nodes, known or {})
    labels = [
        f"{kind} {_REPEATED.sub('', scope or '')}" if kind != "Constant" else ""
        for kind, scope in zip(kinds or [""] * len(scopes), scopes, strict=True)
    ]
    layers = []
    for prefix, stack in nodes.items():
        for index, calls in split_calls(stack, labels, fixed, times).items():
            for call, found in enumerate(calls, 1):
                layers.append(Layer(names[prefix], index, call, paths[prefix, index], tuple(found)))
    # A stack runs when its first layer is done: a few of its nodes may stand far ahead of that.
    first = sorted(layers, key=lambda layer: (layer.call, layer.index), reverse=True)
    done = {layer.stack: layer.nodes[-1] for layer in first}
    return sorted(layers, key=lambda layer: (done[layer.stack], layer.call, layer.index))


def _named(nodes: Mapping[str, Mapping[int, Any]], known: Mapping[str, int]) -> dict[str, str]:
    """The names of stacks by path."""
    named = name_stacks(path.rstrip("#") for path in nodes)
    names = {path: named[path.rstrip("#")] for path in nodes}
    return _reconciled(names, {path: len(layers) for path, layers in nodes.items()}, known)


def _numbered(scope: str) -> list[tuple[str, int, str]]:
    """Every reading of `scope` as layer of a stack: path of the stack, index, path inside the
    layer; the outermost first."""
    parts = scope.split(".")
    readings = []
    for at, part in enumerate(parts):
        rest = ".".join(parts[at + 1 :])
        if part.isdigit():
            readings.append((".".join(parts[:at]), int(part), rest))
        elif match := _NUMBERED.match(part):
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
