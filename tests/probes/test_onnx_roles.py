"""Roles of nodes; truth is the architecture of the models and the modules that nodes come from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper

from divergence.errors import SourceError
from divergence.probes.onnx.graph import Graph
from divergence.probes.onnx.nodes import NodeInfo, describe_nodes, nodes_from_json, nodes_to_json
from divergence.probes.onnx.roles import find_roles
from divergence.probes.onnx.walk import MOVEMENT, ROLES, depends_on_inputs
from tests.models import MODELS, inputs_for
from tests.probes.test_onnx_sites import Flat, scripted
from tests.smollm2 import quiet

pytestmark = pytest.mark.filterwarnings("ignore")


def exported(kind: str, path: Path, opset: int | None = None) -> ModelProto:
    """Exports with the dynamo exporter."""
    model, inputs = MODELS[kind](), inputs_for(kind)
    with quiet():
        torch.onnx.export(
            Flat(model, list(inputs)).eval(),
            tuple(inputs.values()),
            str(path),
            dynamo=True,
            input_names=list(inputs),
            output_names=["logits"],
            opset_version=opset,
            verbose=False,
        )
    return onnx.load(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ModelProto]:
    """Exports by name: `gpt2`, or `gpt2:script` for the TorchScript exporter, `llama:23` for an opset."""
    folder, made = tmp_path_factory.mktemp("roles"), {}

    def make(name: str) -> ModelProto:
        if name not in made:
            kind, _, how = name.partition(":")
            path = folder / f"{kind}{how}.onnx"
            if how == "script":
                scripted(kind, path, inputs_for(kind))
                made[name] = onnx.load(path)
            else:
                made[name] = exported(kind, path, int(how) if how else None)
        return made[name]

    return make


def count(nodes: tuple[NodeInfo, ...], role: str, *ops: str) -> int:
    return sum(node.role == role and node.op in ops for node in nodes)


# All have three layers. Of each: products in projections (the head's included) and in the MLPs,
# norms, residual sums.
ARCHITECTURES: dict[str, tuple[int, int, int, int]] = {
    "llama": (13, 9, 7, 6),
    "llama-eager:script": (13, 9, 7, 6),
    "gemma2": (13, 9, 13, 6),
    "gpt2": (7, 6, 7, 6),
    "gpt2:script": (7, 6, 7, 6),
    "bert:script": (12, 6, 7, 6),
}


SLOW = ("llama", "gemma2", "gpt2")


def named(*names: str) -> list[Any]:
    return [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in names]


@pytest.mark.parametrize("name", named(*ARCHITECTURES))
def test_roles_follow_the_architecture(name: str, model: Callable[[str], ModelProto]) -> None:
    nodes = describe_nodes(Graph(model(name)))
    projections, mlps, norms, residuals = ARCHITECTURES[name]
    found = (
        count(nodes, "projection", "MatMul", "Gemm"),
        count(nodes, "mlp", "MatMul", "Gemm"),
        count(nodes, "norm", "Sqrt", "LayerNormalization"),
        count(nodes, "residual", "Add"),
    )
    assert found[:2] == (projections, mlps)
    assert found[2:] == (norms, residuals)
    assert count(nodes, "softmax", "Softmax") == 3
    assert count(nodes, "attention_product", "MatMul") == 6
    for node in nodes:
        leaf = node.module.rsplit(".", 1)[-1]
        computes = node.op not in MOVEMENT
        if computes and (leaf.endswith("norm") or leaf.startswith("ln_") or leaf == "LayerNorm"):
            assert node.role == "norm", node
        if computes and leaf in ("act", "act_fn", "intermediate_act_fn"):
            assert node.role == "activation", node
        if leaf.endswith(("_proj", "c_attn")) and ".mlp." not in node.module and computes:
            assert node.role == "projection", node
        if node.op in ("Sin", "Cos") or (computes and leaf == "rotary_emb"):
            assert node.role == "rotary", node
    assert {node.role for node in nodes} <= set(ROLES)
    assert {node.layer for node in nodes if node.role == "softmax"} == {0, 1, 2}


def stripped(found: ModelProto) -> ModelProto:
    """Without metadata and names of nodes: structure is all that is left."""
    bare = ModelProto()
    bare.CopyFrom(found)
    for i, node in enumerate(bare.graph.node):
        del node.metadata_props[:]
        node.name = f"n{i}"
    return bare


@pytest.mark.parametrize("name", named("llama", "llama-eager:script", "gpt2:script", "gemma2"))
def test_structure_alone_gives_the_same_roles(name: str, model: Callable[[str], ModelProto]) -> None:
    full, bare = (describe_nodes(Graph(m)) for m in (model(name), stripped(model(name))))
    assert {node.module for node in bare} == {""} and {node.layer for node in bare} == {None}
    other = [
        (a.op, a.role, b.role, a.module)
        for a, b in zip(full, bare, strict=True)
        if a.role != b.role and a.op not in MOVEMENT
    ]
    assert other == []


@pytest.mark.slow
def test_fused_operators_say_what_they_are(model: Callable[[str], ModelProto]) -> None:
    nodes = describe_nodes(Graph(model("llama:23")))
    ops = Counter(node.op for node in nodes)
    assert ops["Attention"] == count(nodes, "attention_product", "Attention") == 3
    assert ops["RMSNormalization"] == count(nodes, "norm", "RMSNormalization")
    assert count(nodes, "norm", "RMSNormalization", "Sqrt") == 7


def graph(
    nodes: list[Any], given: dict[str, int], outputs: list[str], weights: dict[str, Any] | None = None
) -> Graph:
    inputs = [helper.make_tensor_value_info(name, kind, [2, 4]) for name, kind in given.items()]
    outs = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in outputs]
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    return Graph(helper.make_model(helper.make_graph(nodes, "g", inputs, outs, initializers)))


def test_casts_ask_for_a_type() -> None:
    half = torch.zeros(4, 4, dtype=torch.float16).numpy()
    found = describe_nodes(
        graph(
            [
                helper.make_node("MatMul", ["x", "w"], ["a"], name="product"),
                helper.make_node("Cast", ["a"], ["b"], name="up", to=TensorProto.FLOAT),
                helper.make_node("Softmax", ["b"], ["c"], name="softmax"),
                helper.make_node("Cast", ["c"], ["d"], name="down", to=TensorProto.FLOAT16),
                helper.make_node("MatMul", ["d", "w"], ["e"], name="last"),
            ],
            {"x": TensorProto.FLOAT16},
            ["e"],
            {"w": half},
        )
    )
    asked = {node.name: (node.dtype, node.computed_in) for node in found}
    assert asked == {
        "product": ("float16", ""),
        "up": ("float32", "float32"),
        "softmax": ("float32", "float32"),
        "down": ("float16", "float16"),
        "last": ("float16", "float16"),
    }


def test_angles_of_cast_positions_ask_for_the_type_of_the_cast() -> None:
    scale = torch.ones(1, 4).numpy()
    found = describe_nodes(
        graph(
            [
                helper.make_node("Cast", ["pos"], ["p"], name="cast", to=TensorProto.FLOAT),
                helper.make_node("Mul", ["p", "scale"], ["angle"], name="angle"),
                helper.make_node("Sin", ["angle"], ["sin"], name="sin"),
                helper.make_node("Mul", ["x", "sin"], ["y"], name="use"),
            ],
            {"pos": TensorProto.INT64, "x": TensorProto.FLOAT},
            ["y"],
            {"scale": scale},
        )
    )
    assert [node.computed_in for node in found] == ["float32", "float32", "float32", ""]
    assert [node.role for node in found[:3]] == ["rotary"] * 3


def test_what_depends_on_no_input_is_constant() -> None:
    found = graph(
        [
            helper.make_node("Shape", ["x"], ["s"], name="shape"),
            helper.make_node("Cast", ["s"], ["f"], name="cast", to=TensorProto.FLOAT),
            helper.make_node("Sin", ["f"], ["sin"], name="sin"),
            helper.make_node("Mul", ["x", "x"], ["y"], name="square"),
        ],
        {"x": TensorProto.FLOAT},
        ["y", "sin"],
    )
    assert depends_on_inputs(found) == [False, False, False, True]
    assert [node.constant for node in describe_nodes(found)] == [True, True, True, False]


def test_an_empty_graph_has_no_nodes() -> None:
    empty = graph([], {"x": TensorProto.FLOAT}, ["x"])
    assert describe_nodes(empty) == () and find_roles(empty, ()) == []


def test_unnamed_nodes_are_called_after_their_output() -> None:
    found = describe_nodes(graph([helper.make_node("Relu", ["x"], ["y"])], {"x": TensorProto.FLOAT}, ["y"]))
    assert found[0].name == "y"


def test_descriptions_survive_json() -> None:
    nodes = (
        NodeInfo("a", "MatMul", "m.layers.0.q", "projection", "", 0, "float16"),
        NodeInfo("b", "Sin", role="rotary", computed_in="float32", constant=True),
        NodeInfo("", "Add"),
    )
    assert nodes_from_json(json.loads(json.dumps(nodes_to_json(nodes)))) == nodes
    assert nodes_from_json([{"name": "a", "op": "Add", "later": 1}]) == (NodeInfo("a", "Add"),)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "no list of ONNX nodes"),
        (None, "no list of ONNX nodes"),
        (["a"], "describes no ONNX node"),
        ([{"name": "a"}], "name and op are needed"),
        ([{"name": "a", "op": "Add", "layer": "3"}], "layer cannot be '3'"),
        ([{"name": "a", "op": "Add", "layer": True}], "layer cannot be True"),
        ([{"name": "a", "op": "Add", "constant": 1}], "constant cannot be 1"),
        ([{"name": "a", "op": "Add", "role": None}], "role cannot be None"),
    ],
)
def test_broken_descriptions_are_errors(value: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        nodes_from_json(value)
