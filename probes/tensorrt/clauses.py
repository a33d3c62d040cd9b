"""The clauses of an engine's contract: nodes, their roll-up by module, ignored requests, reformats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from divergence.probes.onnx.walk import MOVEMENT
from divergence.probes.tensorrt.inspector import EngineLayer
from divergence.probes.tensorrt.ran import MIXED
from divergence.probes.tensorrt.unnamed import layer_pattern, ranges

# Rounding error of a type as a power of two: significant bits, the implicit one included.
_BITS: Mapping[str, int] = {
    "Double": 53, "Float": 24, "TF32": 11, "Half": 11, "BFloat16": 8, "FP8": 4, "Int8": 7, "FP4": 2, "Int4": 3
}  # fmt: skip
_REFORMATS = frozenset({"Reformat", "NoOp", "Copy"})
_COPIES = frozenset({"Mov", "Cas", "Tra", "Res", "Rep", "Sli", "Con"})
_WORDS: Mapping[str, str] = {"attention_product": "attention product", "mlp": "MLP"}
_KERNEL_WIDTH = 48


@dataclass(frozen=True)
class NodeRun:
    """One ONNX node in the engine.

    Attributes:
        name, op, module, role, stack, layer: see `divergence.probes.onnx.nodes.NodeInfo`.
        asked: type that the ONNX graph asks for, in the inspector's words; empty if unknown.
        explicit: whether a Cast in the graph asks for it, or it is finer than most products of the graph.
        state: `ran`; `folded`: in no engine layer, since it depends on no input's contents, and was
            computed when the engine was built; `absent`: in no engine layer for another reason
            (merged into a neighbour, moved no data, or not needed).
        precision: type that it ran in, in the inspector's words; `mixed`, `unknown`, or empty where
            it did not run or moves elements that are no floats.
        accumulator: type in which its products were summed; empty where it makes none, `unknown` where
            the kernel does not show it.
        basis: what tells precision: `tactic`, `tensors`, `cast` (casts in the kernel's name),
            `asked` (strongly typed network), or empty.
        kernel: kind of the kernel that it ran in, the first if several.
        engine_layers: names of the engine's layers that it went into; that of `kernel` first.
    """

    name: str
    op: str
    module: str
    role: str
    stack: str
    layer: int | None
    asked: str
    explicit: bool
    state: str
    precision: str = ""
    accumulator: str = ""
    basis: str = ""
    kernel: str = ""
    engine_layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """The nodes of one role in one module, over all layers in which the same became of them.

    Attributes:
        module: path of the module, `*` for the index of the layer (`model.layers.*.self_attn`).
        role: one of `divergence.probes.onnx.walk.ROLES`.
        stack: name of the layer stack.
        layers: indices of layers as ranges (`0-17`, `0,2-5`); empty outside of layers.
        precision: type that its computing nodes ran in; `mixed` if several, `unknown`, or empty
            where all were folded or absent.
        precisions: how many nodes ran in which type.
        accumulator: type in which its products were summed; `mixed` if several.
        asked: type that the graph asks for; `mixed` if several, empty if unknown.
        kernels: kinds of kernels that they ran in.
        nodes: number of nodes, and of them those that were `folded` or `absent`.
    """

    module: str
    role: str
    stack: str
    layers: str
    precision: str
    precisions: Mapping[str, int]
    accumulator: str
    asked: str
    kernels: tuple[str, ...]
    nodes: int
    folded: int
    absent: int


@dataclass(frozen=True)
class Ignored:
    """A type that the graph explicitly asks for and that the engine did not use.

    Attributes:
        sentence: all of it in words.
        role, asked, ran, kernel: as of `NodeRun`.
        module: path with `*` for the index of the layer.
        layers: indices of layers as ranges; empty outside of layers.
        nodes: names of the nodes.
    """

    sentence: str
    role: str
    module: str
    layers: str
    asked: str
    ran: str
    kernel: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Reformat:
    """A layer of the engine that only changes type or layout of a tensor, or copies it.

    Attributes:
        name: name of the engine's layer.
        source, target: names of the tensors.
        before, after: their types.
        dims: their sizes.
    """

    name: str
    source: str
    target: str
    before: str
    after: str
    dims: tuple[int, ...]

    @property
    def what(self) -> str:
        """`cast` where the type changes, `copy` otherwise."""
        return "cast" if self.before != self.after else "copy"


def finer(asked: str, other: str) -> bool:
    """Whether the type `asked` has more significant bits than `other`, as far as both are known."""
    return asked in _BITS and other in _BITS and _BITS[asked] > _BITS[other]


def one(values: Iterable[str]) -> str:
    """The only value, `mixed` if there are several; the empty one does not count."""
    found = sorted({value for value in values if value})
    return found[0] if len(found) == 1 else MIXED if found else ""


def rows(runs: Sequence[NodeRun]) -> tuple[Row, ...]:
    """Nodes by module and role; layers in which the same became of them share a row."""
    by_place: dict[tuple[str, str, str], dict[int | None, list[NodeRun]]] = {}
    for run in runs:
        if run.role == "other" or (run.op in MOVEMENT and run.role not in ("rotary", "embedding")):
            continue
        key = (run.stack, layer_pattern(run.module, run.layer), run.role)
        by_place.setdefault(key, {}).setdefault(run.layer, []).append(run)
    found = []
    for (stack, module, role), by_layer in by_place.items():
        alike: dict[Any, list[int | None]] = {}
        for layer, members in by_layer.items():
            alike.setdefault(_fate(members), []).append(layer)
        for same in alike.values():
            members = [run for layer in same for run in by_layer[layer]]
            found.append(_row(module, role, stack, same, members))
    return tuple(found)


def _computing(runs: Iterable[NodeRun]) -> list[NodeRun]:
    """Those that compute floats; all of them if none does."""
    runs = list(runs)
    return [run for run in runs if run.precision and run.op not in MOVEMENT] or runs


def _fate(runs: Sequence[NodeRun]) -> tuple[Any, ...]:
    told = _computing(runs)
    counts = Counter(run.precision for run in told)
    kinds = frozenset(_stem(run.kernel) for run in told)
    return (
        frozenset(counts),
        frozenset(run.accumulator for run in told),
        frozenset(r.state for r in told),
        kinds,
    )


def _stem(kernel: str) -> str:
    """A kernel without what changes from layer to layer: which neighbours were fused into it."""
    return "__myl" if kernel.startswith("__myl_") else kernel


def _row(module: str, role: str, stack: str, layers: Sequence[int | None], runs: Sequence[NodeRun]) -> Row:
    told = _computing(runs)
    counts = Counter(run.precision for run in told if run.precision)
    return Row(
        module=module,
        role=role,
        stack=stack,
        layers=ranges(layer for layer in layers if layer is not None),
        precision=one(counts),
        precisions=dict(sorted(counts.items())),
        accumulator=one(run.accumulator for run in runs),
        asked=one(run.asked for run in told),
        kernels=tuple(dict.fromkeys(run.kernel for run in told if run.kernel)),
        nodes=len(runs),
        folded=sum(run.state == "folded" for run in runs),
        absent=sum(run.state == "absent" for run in runs),
    )


def ignored(runs: Sequence[NodeRun]) -> tuple[Ignored, ...]:
    """Types that the graph explicitly asks for, where the node is known to have run in a coarser one."""
    found: dict[tuple[str, ...], list[NodeRun]] = {}
    for run in runs:
        if run.explicit and finer(run.asked, run.precision):
            role = run.role if run.role != "other" else f"{run.op}"
            module = layer_pattern(run.module, run.layer)
            # Which neighbours were fused in may differ by layer; the request is the same one.
            found.setdefault((role, module, run.asked, run.precision, _stem(run.kernel)), []).append(run)
    return tuple(_as_ignored(key, members) for key, members in found.items())


def _as_ignored(key: tuple[str, ...], runs: Sequence[NodeRun]) -> Ignored:
    role, module, asked, ran, _ = key
    layers = {(run.stack, run.layer) for run in runs if run.layer is not None}
    what = "rotary angles" if any(run.op in ("Sin", "Cos") for run in runs) else _WORDS.get(role, role)
    where = (
        f" of {len(layers)} layer{'s' * (len(layers) > 1)}" if layers else f" ({module})" if module else ""
    )
    kernels = list(dict.fromkeys(run.kernel for run in runs))
    inside = short(kernels[0]) + (f" and {len(kernels) - 1} more" if len(kernels) > 1 else "")
    return Ignored(
        sentence=f"{what}{where} asked for {asked}, ran as {ran} inside {inside}",
        role=role,
        module=module,
        layers=ranges(run.layer for run in runs if run.layer is not None),
        asked=asked,
        ran=ran,
        kernel=kernels[0],
        nodes=tuple(run.name for run in runs),
    )


def short(kernel: str) -> str:
    """The name of a kernel, cut where it is very long."""
    return kernel if len(kernel) <= _KERNEL_WIDTH else kernel[: _KERNEL_WIDTH - 3] + "..."


def reformats(layers: Iterable[EngineLayer]) -> Iterator[Reformat]:
    """The layers that only cast, copy or lay out anew."""
    for layer in layers:
        moving = bool(layer.operations) and set(layer.operations) <= _COPIES
        if layer.kind not in _REFORMATS and not (moving and not layer.onnx_nodes):
            continue
        if layer.inputs and layer.outputs:
            source, target = layer.inputs[0], layer.outputs[0]
            yield Reformat(layer.name, source.name, target.name, source.dtype, target.dtype, target.dims)


def counted(number: int, noun: str) -> str:
    """`1 kernel`, `2 kernels`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
