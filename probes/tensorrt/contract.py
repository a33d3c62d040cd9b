"""What an engine really does with every ONNX node and every module of the reference.

Precision here is the type of the tensors that a kernel reads and writes, or that the name of its
tactic states. What a kernel holds in registers is shown by neither: a fused attention of Half tensors
may sum in Float. Where a kernel has tensors of several types and nothing tells which operation ran in
which, the answer is `mixed`; where nothing is said at all, `unknown`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from divergence.probes.onnx.nodes import NodeInfo
from divergence.probes.onnx.roles import MOVEMENT, ROLES
from divergence.probes.tensorrt.inspector import FLOATING, EngineLayer, EngineText, word
from divergence.probes.tensorrt.ran import MIXED, UNKNOWN, Ran, ran_in
from divergence.probes.tensorrt.unnamed import infer_nodes, layer_pattern, ranges

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
        role: one of `divergence.probes.onnx.roles.ROLES`.
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


@dataclass(frozen=True)
class Contract:
    """What an engine does with every node and module.

    Attributes:
        requested: precision that the engine was built for: `fp16`, `typed`, ...; empty if unknown.
        from_model: whether descriptions of the nodes were given; without them roles are guessed from
            names and kernels, and no request can be told to be ignored.
        nodes: every ONNX node, in the order of the graph.
        rows: nodes by module and role.
        ignored: explicit requests of the graph that the engine did not follow.
        reformats: layers that only cast or copy, in order of execution.
        remarks: what is worth knowing, in sentences.
        engine_layers: number of the engine's layers.
    """

    requested: str
    from_model: bool
    nodes: tuple[NodeRun, ...]
    rows: tuple[Row, ...]
    ignored: tuple[Ignored, ...]
    reformats: tuple[Reformat, ...]
    remarks: tuple[str, ...]
    engine_layers: int

    def to_json(self) -> dict[str, Any]:
        """The contract as JSON values, for the key `contract` of `report.json`.

        Keys: `requested`, `from_model`, `engine_layers`, `rows`, `ignored`, `reformats`, `remarks`,
        `nodes`, each a list of objects whose keys are the attributes of `Row`, `Ignored`, `Reformat`
        (and its `what`), `NodeRun`; `remarks` a list of sentences. Types are in the inspector's words:
        `Float`, `Half`, `BFloat16`, `TF32`, `FP8`, `Int8`. Of `nodes`, keys without content are left out.
        """
        nodes = [{k: v for k, v in asdict(n).items() if v not in ("", None, False, ())} for n in self.nodes]
        return {
            "requested": self.requested,
            "from_model": self.from_model,
            "engine_layers": self.engine_layers,
            "rows": [_listed(asdict(row)) for row in self.rows],
            "ignored": [_listed(asdict(item)) for item in self.ignored],
            "reformats": [{**_listed(asdict(item)), "what": item.what} for item in self.reformats],
            "remarks": list(self.remarks),
            "nodes": [_listed(node) for node in nodes],
        }


def make_contract(
    layers: EngineText | Sequence[EngineLayer], nodes: Sequence[NodeInfo] = (), requested: str = ""
) -> Contract:
    """Says what the engine did with every node of the ONNX graph that it was built from.

    Args:
        layers: what the inspector says of the engine. Its layers alone will do; with its bindings, a
            cast to the type of an output is told from one within a kernel.
        nodes: descriptions of the nodes; without them, roles are guessed from names and kernels.
        requested: precision that it was built for; `typed` for a strongly typed network, in which the
            types of the graph bind the engine.
    """
    text = layers if isinstance(layers, EngineText) else EngineText(tuple(layers))
    described = tuple(nodes) or infer_nodes(text.layers)
    places: dict[str, list[EngineLayer]] = defaultdict(list)
    for layer in text.layers:
        for name in layer.onnx_nodes:
            places[name].append(layer)
    usual = _usual(described)
    typed = requested.startswith("typed")
    runs = tuple(_run(node, places.get(node.name, []), text.bindings, usual, typed=typed) for node in described)
    ignored = _ignored(runs)
    return Contract(
        requested=requested,
        from_model=bool(nodes),
        nodes=runs,
        rows=_rows(runs),
        ignored=ignored,
        reformats=tuple(_reformats(text.layers)),
        remarks=tuple(_remarks(runs, text.layers, from_model=bool(nodes))),
        engine_layers=len(text.layers),
    )


def _listed(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


def _usual(nodes: Iterable[NodeInfo]) -> str:
    """The type that most products with weights ask for."""
    kinds = Counter(word(node.dtype) for node in nodes if node.role in ("projection", "mlp") and node.dtype)
    return kinds.most_common(1)[0][0] if kinds else ""


def _finer(asked: str, other: str) -> bool:
    return asked in _BITS and other in _BITS and _BITS[asked] > _BITS[other]


def _run(
    node: NodeInfo, layers: Sequence[EngineLayer], bindings: Sequence[str], usual: str, *, typed: bool
) -> NodeRun:
    # A cast to a type asks for that type; everything else for the type of its result.
    asked = word(node.computed_in or node.dtype)
    asked = asked if asked in FLOATING else ""
    found = ran_in(node, layers, bindings, asked if typed else "") if layers else Ran()
    state = "ran" if layers else "folded" if node.constant else "absent"
    return NodeRun(
        name=node.name,
        op=node.op,
        module=node.module,
        role=node.role,
        stack=node.stack,
        layer=node.layer,
        asked=asked,
        explicit=bool(asked) and (bool(node.computed_in) or _finer(asked, usual)),
        state=state,
        precision=found.precision,
        accumulator=found.accumulator,
        basis=found.basis,
        kernel=found.layer.kernel if found.layer else "",
        engine_layers=tuple(
            dict.fromkeys([*([found.layer.name] if found.layer else []), *(layer.name for layer in layers)])
        ),
    )


def _one(values: Iterable[str]) -> str:
    """The only value, `mixed` if there are several; the empty one does not count."""
    found = sorted({value for value in values if value})
    return found[0] if len(found) == 1 else MIXED if found else ""


def _rows(runs: Sequence[NodeRun]) -> tuple[Row, ...]:
    by_place: dict[tuple[str, str, str], dict[int | None, list[NodeRun]]] = {}
    for run in runs:
        if run.role == "other" or (run.op in MOVEMENT and run.role not in ("rotary", "embedding")):
            continue
        key = (run.stack, layer_pattern(run.module, run.layer), run.role)
        by_place.setdefault(key, {}).setdefault(run.layer, []).append(run)
    rows = []
    for (stack, module, role), by_layer in by_place.items():
        alike: dict[Any, list[int | None]] = {}
        for layer, members in by_layer.items():
            alike.setdefault(_fate(members), []).append(layer)
        for same in alike.values():
            members = [run for layer in same for run in by_layer[layer]]
            rows.append(_row(module, role, stack, same, members))
    return tuple(rows)


def _computing(runs: Iterable[NodeRun]) -> list[NodeRun]:
    """Those that compute floats; all of them if none does."""
    runs = list(runs)
    return [run for run in runs if run.precision and run.op not in MOVEMENT] or runs


def _fate(runs: Sequence[NodeRun]) -> tuple[Any, ...]:
    told = _computing(runs)
    counts = Counter(run.precision for run in told)
    kinds = frozenset(_stem(run.kernel) for run in told)
    return (frozenset(counts), frozenset(run.accumulator for run in told), frozenset(r.state for r in told), kinds)


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
        precision=_one(counts),
        precisions=dict(sorted(counts.items())),
        accumulator=_one(run.accumulator for run in runs),
        asked=_one(run.asked for run in told),
        kernels=tuple(dict.fromkeys(run.kernel for run in told if run.kernel)),
        nodes=len(runs),
        folded=sum(run.state == "folded" for run in runs),
        absent=sum(run.state == "absent" for run in runs),
    )


def _ignored(runs: Sequence[NodeRun]) -> tuple[Ignored, ...]:
    found: dict[tuple[str, ...], list[NodeRun]] = {}
    for run in runs:
        if run.explicit and _finer(run.asked, run.precision):
            role = run.role if run.role != "other" else f"{run.op}"
            module = layer_pattern(run.module, run.layer)
            # Which neighbours were fused in may differ by layer; the request is the same one.
            found.setdefault((role, module, run.asked, run.precision, _stem(run.kernel)), []).append(run)
    return tuple(_as_ignored(key, members) for key, members in found.items())


def _as_ignored(key: tuple[str, ...], runs: Sequence[NodeRun]) -> Ignored:
    role, module, asked, ran, _ = key
    layers = {(run.stack, run.layer) for run in runs if run.layer is not None}
    what = _WORDS.get(role, role)
    where = f" of {len(layers)} layer{'s' * (len(layers) > 1)}" if layers else f" ({module})" if module else ""
    kernels = list(dict.fromkeys(run.kernel for run in runs))
    inside = short(kernels[0]) + (f" and {len(kernels) - 1} more kernels" if len(kernels) > 1 else "")
    return Ignored(
        sentence=f"{what}{where} asked for {asked}, ran as {ran} inside {inside}",
        role=role,
        module=module,
        layers=ranges(layer for _, layer in layers if layer is not None),
        asked=asked,
        ran=ran,
        kernel=kernels[0],
        nodes=tuple(run.name for run in runs),
    )


def short(kernel: str) -> str:
    """The name of a kernel, cut where it is very long."""
    return kernel if len(kernel) <= _KERNEL_WIDTH else kernel[: _KERNEL_WIDTH - 3] + "..."


def _reformats(layers: Iterable[EngineLayer]) -> Iterable[Reformat]:
    for layer in layers:
        moving = bool(layer.operations) and set(layer.operations) <= _COPIES
        if layer.kind not in _REFORMATS and not (moving and not layer.onnx_nodes):
            continue
        if layer.inputs and layer.outputs:
            source, target = layer.inputs[0], layer.outputs[0]
            yield Reformat(layer.name, source.name, target.name, source.dtype, target.dtype, target.dims)


def _remarks(runs: Sequence[NodeRun], layers: Sequence[EngineLayer], *, from_model: bool) -> Iterable[str]:
    if not from_model:
        yield (
            "the engine has no description of its ONNX nodes beside it: roles are guessed from names and "
            "kernels, modules and requests are unknown; `divergence build` writes one"
        )
    gemms = Counter((g.precision, g.accumulator) for layer in layers if (g := layer.gemm) is not None)
    for (precision, accumulator), count in sorted(gemms.items()):
        if precision == "TF32":
            yield f"{_kernels(count)} of products round their Float operands to TF32"
        elif accumulator in ("Half", "BFloat16"):
            yield f"{_kernels(count)} of products of {precision} sum in {accumulator}"
    yield from _of_angles(runs, layers)
    nowhere = Counter(run.state for run in runs if run.op not in MOVEMENT and run.role not in ("other", "mask"))
    if nowhere["absent"]:
        yield f"{nowhere['absent']} computing nodes are in no layer of the engine: merged, or not needed"
    hidden = sum(run.precision == UNKNOWN for run in runs)
    if hidden:
        yield f"the precision of {hidden} nodes is unknown: their layers show no types"


def _kernels(count: int) -> str:
    return f"{count} kernel" if count == 1 else f"{count} kernels"


def _of_angles(runs: Sequence[NodeRun], layers: Sequence[EngineLayer]) -> Iterable[str]:
    """Where the angles of a rotary embedding were computed: the commonest cause of wrong keys."""
    waves = [run for run in runs if run.op in ("Sin", "Cos") and run.role == "rotary"]
    ran = [run for run in waves if run.state == "ran"]
    if ran:
        precision = _one(run.precision for run in ran)
        yield f"rotary angles, their sines and cosines: {precision}, inside {short(ran[0].kernel)}"
    elif any(run.state == "folded" for run in waves):
        yield "rotary angles were constant-folded when the engine was built: no kernel computes them"
    elif not waves and any(run.role == "rotary" for run in runs):
        if not any({"Sin", "Cos"} & set(layer.operations) for layer in layers):
            yield "no kernel computes rotary angles: their sines and cosines are constants of the engine"


__all__ = [
    "MIXED", "ROLES", "UNKNOWN", "Contract", "Ignored", "NodeRun", "Reformat", "Row", "make_contract", "short",
]  # fmt: skip
