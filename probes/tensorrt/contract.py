"""What an engine really does with every ONNX node and every module of the reference.

Precision here is the type of the tensors that a kernel reads and writes, or that the name of its
tactic states. What a kernel holds in registers is shown by neither: a fused attention of Half tensors
may sum in Float. Where a kernel has tensors of several types and nothing tells which operation ran in
which, the answer is `mixed`; where nothing is said at all, `unknown`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from divergence.errors import SourceError
from divergence.probes.onnx.nodes import NodeInfo
from divergence.probes.onnx.walk import MOVEMENT
from divergence.probes.tensorrt.clauses import (
    Ignored,
    NodeRun,
    Reformat,
    Row,
    counted,
    finer,
    ignored,
    one,
    reformats,
    rows,
    short,
)
from divergence.probes.tensorrt.inspector import FLOATING, EngineLayer, EngineText, word
from divergence.probes.tensorrt.ran import UNKNOWN, Ran, ran_in
from divergence.probes.tensorrt.unnamed import infer_nodes


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
        nodes = [{k: v for k, v in asdict(node).items() if v or v == 0} for node in self.nodes]
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

    Raises:
        SourceError: the engine names ONNX nodes, and `nodes` describes none of them.
    """
    text = layers if isinstance(layers, EngineText) else EngineText(tuple(layers))
    described = tuple(nodes) or infer_nodes(text.layers)
    places: dict[str, list[EngineLayer]] = defaultdict(list)
    for layer in text.layers:
        for name in layer.onnx_nodes:
            places[name].append(layer)
    named = {node.name for node in described}
    if places and not named & places.keys():
        raise SourceError(
            f"none of the {len(places)} ONNX nodes that the engine names (such as '{next(iter(places))}') is "
            f"among the {len(named)} described: the description is of another model; build the engine anew"
        )
    usual = _usual(described)
    typed = requested.startswith("typed")
    runs = tuple(
        _run(node, places.get(node.name, []), text.bindings, usual, typed=typed) for node in described
    )
    return Contract(
        requested=requested,
        from_model=bool(nodes),
        nodes=runs,
        rows=rows(runs),
        ignored=ignored(runs),
        reformats=tuple(reformats(text.layers)),
        remarks=(
            *_of_description(len(places), len(places.keys() - named), from_model=bool(nodes)),
            *_remarks(runs, text.layers),
        ),
        engine_layers=len(text.layers),
    )


def _listed(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


def _usual(nodes: Iterable[NodeInfo]) -> str:
    """The type that most products with weights ask for."""
    kinds = Counter(word(node.dtype) for node in nodes if node.role in ("projection", "mlp") and node.dtype)
    return kinds.most_common(1)[0][0] if kinds else ""


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
        explicit=bool(asked) and (bool(node.computed_in) or finer(asked, usual)),
        state=state,
        precision=found.precision,
        accumulator=found.accumulator,
        basis=found.basis,
        kernel=found.layer.kernel if found.layer else "",
        engine_layers=tuple(
            dict.fromkeys([*([found.layer.name] if found.layer else []), *(layer.name for layer in layers)])
        ),
    )


def _of_description(names: int, undescribed: int, *, from_model: bool) -> Iterator[str]:
    if not names:
        yield "the engine's layers name no ONNX nodes: what became of the model's operators is unknown"
    elif not from_model:
        yield (
            "the engine has no description of its ONNX nodes beside it: roles are guessed from names and "
            "kernels, modules and requests are unknown; `divergence build` writes one"
        )
    elif undescribed:
        yield f"{undescribed} ONNX nodes that the engine names are not described and left out"


def _remarks(runs: Sequence[NodeRun], layers: Sequence[EngineLayer]) -> Iterator[str]:
    gemms = Counter((g.precision, g.accumulator) for layer in layers if (g := layer.gemm) is not None)
    for (precision, accumulator), count in sorted(gemms.items()):
        if precision == "TF32":
            yield f"{counted(count, 'kernel')} of products round their Float operands to TF32"
        elif accumulator in ("Half", "BFloat16"):
            yield f"{counted(count, 'kernel')} of products of {precision} sum in {accumulator}"
    yield from _of_angles(runs, layers)
    computing = [run for run in runs if run.op not in MOVEMENT and run.role not in ("other", "mask")]
    if absent := sum(run.state == "absent" for run in computing):
        yield f"{counted(absent, 'computing node')} in no layer of the engine: merged, or not needed"
    if folded := sum(run.state == "folded" for run in computing):
        yield f"{counted(folded, 'computing node')} constant-folded when the engine was built"
    hidden = sum(run.precision == UNKNOWN for run in runs)
    if hidden:
        yield f"the precision of {counted(hidden, 'node')} is unknown: their layers do not show it"


def _of_angles(runs: Sequence[NodeRun], layers: Sequence[EngineLayer]) -> Iterator[str]:
    """Where the angles of a rotary embedding were computed: the commonest cause of wrong keys."""
    waves = [run for run in runs if run.op in ("Sin", "Cos") and run.role == "rotary"]
    ran = [run for run in waves if run.state == "ran"]
    if ran:
        precision = one(run.precision for run in ran)
        yield f"rotary angles, their sines and cosines: {precision}, inside {short(ran[0].kernel)}"
    elif any(run.state == "folded" for run in waves):
        yield "rotary angles were constant-folded when the engine was built: no kernel computes them"
    elif any(run.role == "rotary" for run in runs) and not any(
        {"Sin", "Cos"} & set(layer.operations) for layer in layers
    ):
        yield "no kernel computes rotary angles: their sines and cosines are constants of the engine"
