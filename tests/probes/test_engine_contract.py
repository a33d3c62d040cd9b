"""What engines did with the nodes of their models; truth is read by hand from the recordings."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from divergence.errors import SourceError
from divergence.probes.onnx.nodes import NodeInfo
from divergence.probes.tensorrt.clauses import NodeRun, Row
from divergence.probes.tensorrt.contract import Contract, make_contract
from divergence.probes.tensorrt.inspector import EngineLayer, EngineTensor, EngineText
from divergence.probes.tensorrt.unnamed import layer_pattern, ranges
from tests.probes.recorded_engine import engine, nodes


def row(contract: Contract, module: str, role: str, layers: str = "") -> Row:
    """The only row of this place."""
    found = [r for r in contract.rows if (r.module, r.role) == (module, role) and layers in ("", r.layers)]
    assert len(found) == 1, [(r.module, r.role, r.layers) for r in contract.rows]
    return found[0]


def run(contract: Contract, name: str) -> NodeRun:
    return next(node for node in contract.nodes if node.name == name)


@pytest.fixture(scope="module")
def fp16() -> Contract:
    return make_contract(engine("scale-fp16"), nodes("scale-fp16"), "fp16")


@pytest.fixture(scope="module")
def typed() -> Contract:
    return make_contract(engine("scale-typed_fp16"), nodes("scale-typed_fp16"), "typed")


def test_the_fp16_engine_computes_angles_in_half(fp16: Contract) -> None:
    """The fault of the case study: position x inv_freq, sine and cosine in Half."""
    for name in ("node__to_copy_1", "node_mul_1", "node_sin", "node_cos"):
        found = run(fp16, name)
        assert (found.role, found.asked, found.explicit) == ("rotary", "Float", True)
        assert (found.precision, found.basis) == ("Half", "tensors")
    assert [item.sentence for item in fp16.ignored] == [
        "rotary angles asked for Float, ran as Half inside __myl_CasResMulConSinResCosResResResSliNegSli..."
    ]
    assert any(remark.startswith("rotary angles, their sines and cosines: Half") for remark in fp16.remarks)


def test_the_typed_engine_computes_angles_and_norms_in_float(typed: Contract) -> None:
    for name in ("node__to_copy_1", "node_mul_1", "node_sin", "node_cos", "node_rsqrt", "node_mean_35"):
        assert (run(typed, name).precision, run(typed, name).basis) == ("Float", "asked"), name
    assert row(typed, "layers.*.input_layernorm", "norm").precision == "Float"
    assert row(typed, "layers.*.self_attn", "rotary").precision == "Half"
    assert run(typed, "node_add_5").precision == "Half"  # the sum that starts the kernel of a norm
    assert typed.ignored == ()


def test_accumulators_come_from_tactics(fp16: Contract, typed: Contract) -> None:
    up = row(fp16, "layers.*.mlp.up_proj", "mlp")
    assert (up.layers, up.precision, up.accumulator, up.nodes) == ("0-17", "Half", "Half", 18)
    for leaf in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
        found = row(fp16, f"layers.*.{leaf}", "projection")
        assert (found.layers, found.precision, found.accumulator) == ("0-17", "Half", "Float")
    for leaf, accumulator in (("q_proj", "Half"), ("o_proj", "Float")):
        assert row(typed, f"layers.*.self_attn.{leaf}", "projection").accumulator == accumulator
    assert "18 kernels of products of Half sum in Half" in fp16.remarks
    assert "36 kernels of products of Half sum in Half" in typed.remarks


def test_fused_attention_swallows_products_and_softmax(fp16: Contract) -> None:
    for role in ("attention_product", "softmax", "mask"):
        found = row(fp16, "layers.*.self_attn", role)
        assert (found.layers, found.precision, found.kernels) == ("0-17", "Half", ("_gemm_mha_v2",))
    product = run(fp16, "node_matmul")
    assert (product.kernel, product.accumulator) == ("_gemm_mha_v2", "unknown")
    assert product.engine_layers[0] == "_gemm_mha_v2_myl2_5" and len(product.engine_layers) == 2


def test_every_node_is_told_once(fp16: Contract) -> None:
    assert [node.name for node in fp16.nodes] == [node.name for node in nodes("scale-fp16")]
    assert sum(node.state == "ran" for node in fp16.nodes) == 1032
    gone = {node.op for node in fp16.nodes if node.state == "absent"}
    assert gone == {"Expand", "Transpose", "Reshape"}  # they move no data in a fused attention


def test_casts_that_the_engine_ignored_are_told() -> None:
    cast = [replace(n, computed_in="float32") if n.role == "softmax" else n for n in nodes("scale-fp16")]
    ignored = make_contract(engine("scale-fp16"), cast, "fp16").ignored
    softmax = next(item for item in ignored if item.role == "softmax")
    assert softmax.sentence == "softmax of 18 layers asked for Float, ran as Half inside _gemm_mha_v2"
    assert (softmax.layers, softmax.module, len(softmax.nodes)) == ("0-17", "layers.*.self_attn", 18)


def test_a_type_finer_than_that_of_the_products_is_a_request() -> None:
    half = [
        replace(n, dtype="float32" if n.role == "norm" else "float16", computed_in="")
        for n in nodes("scale-fp16")
    ]
    sentences = [item.sentence for item in make_contract(engine("scale-fp16"), half, "fp16").ignored]
    assert len(sentences) == 2
    assert all(
        s.startswith("norm of 18 layers asked for Float, ran as Half inside __myl_") for s in sentences
    )


def test_strong_typing_that_no_tensor_shows_is_unknown() -> None:
    """A softmax in Float within a strongly typed network cannot have run in Half."""
    cast = [replace(n, dtype="float32") if n.role == "softmax" else n for n in nodes("scale-typed_fp16")]
    contract = make_contract(engine("scale-typed_fp16"), cast, "typed")
    assert row(contract, "layers.*.self_attn", "softmax").precision == "unknown"
    assert "the precision of 18 nodes is unknown: their layers do not show it" in contract.remarks
    assert contract.ignored == ()


def test_folded_angles_are_told() -> None:
    contract = make_contract(engine("bf16"), nodes("bf16"), "bf16")
    assert (
        "no kernel computes rotary angles: their sines and cosines are constants of the engine"
        in contract.remarks
    )
    assert contract.ignored == ()
    sine = NodeInfo("node_sin", "Sin", role="rotary", dtype="float32", constant=True)
    contract = make_contract(engine("bf16"), [sine, *nodes("bf16")], "bf16")
    assert (run(contract, "node_sin").state, run(contract, "node_sin").precision) == ("folded", "")
    assert any("angles were constant-folded" in remark for remark in contract.remarks)
    assert row(contract, "", "rotary").folded == 1


def test_epilogues_wider_than_their_output_are_mixed() -> None:
    contract = make_contract(engine("bf16"), nodes("bf16"), "bf16")
    residual = row(contract, "layers.*", "residual")
    assert (residual.layers, residual.precision) == (
        "0-7",
        "mixed",
    )  # FcAdd: Float epilogue, BFloat16 tensors
    assert row(contract, "layers.*.mlp", "activation").precision == "BFloat16"


def test_reformats_and_casts_of_outputs() -> None:
    contract = make_contract(engine("bf16"), nodes("bf16"), "bf16")
    kinds = [(item.what, item.before, item.after) for item in contract.reformats]
    assert kinds == [("cast", "Float", "BFloat16")] * 2 + [("cast", "BFloat16", "Float")] * 24
    assert [item.source for item in contract.reformats[:2]] == ["x", "mask"]
    assert contract.reformats[2].target == "key_0"


def test_without_descriptions_names_and_kernels_tell() -> None:
    contract = make_contract(engine("scale-typed_fp16"), requested="typed")
    assert not contract.from_model and "no description" in contract.remarks[0]
    found = {r.role: r for r in contract.rows}
    assert found["norm"].precision == "Float"
    assert dict(found["rotary"].precisions)["Float"] == 2  # sine and cosine, between casts
    assert (found["softmax"].precision, found["softmax"].nodes) == ("Half", 18)
    assert (found["projection"].precision, found["projection"].accumulator) == ("Half", "mixed")
    assert contract.ignored == ()
    assert len(contract.nodes) == 1106
    tf32 = make_contract(engine("fp32_tf32on"))
    assert {r.role: r.precision for r in tf32.rows}["projection"] == "TF32"
    assert "48 kernels of products round their Float operands to TF32" in tf32.remarks


def test_guesses_without_descriptions_agree_with_descriptions() -> None:
    """Of what gets a role by guessing, 99 % get that which the model shows (MLPs count as projections)."""
    known = {node.name: node.role.replace("mlp", "projection") for node in nodes("scale-fp16")}
    guessed = {
        node.name: node.role for node in make_contract(engine("scale-fp16")).nodes if node.role != "other"
    }
    wrong = {name: (role, known[name]) for name, role in guessed.items() if role != known[name]}
    assert len(guessed) > 600
    assert len(wrong) <= 0.01 * len(guessed), wrong


def test_json_holds_everything(fp16: Contract) -> None:
    found = json.loads(json.dumps(fp16.to_json()))
    assert set(found) == {field.name for field in fields(Contract)}
    assert len(found["nodes"]) == len(fp16.nodes)
    assert found["nodes"][50]["layer"] == 0
    assert set(found["rows"][0]) == {field.name for field in fields(Row)}
    assert found["ignored"][0]["sentence"].startswith("rotary angles asked for Float")
    assert found["reformats"][0]["what"] == "cast"


def test_a_description_of_another_model_is_an_error() -> None:
    with pytest.raises(SourceError, match="none of the 456 ONNX nodes .* is of another model"):
        make_contract(engine("bf16"), [NodeInfo("a", "MatMul")], "bf16")


def test_undescribed_nodes_are_counted() -> None:
    contract = make_contract(engine("bf16"), nodes("bf16")[:100], "bf16")
    assert any("ONNX nodes that the engine names are not described" in remark for remark in contract.remarks)


def kernel(name: str, inputs: str, outputs: str) -> EngineLayer:
    """A layer with tensors of the types named, into which the node `n` went."""
    read = tuple(EngineTensor(f"i{i}", dtype) for i, dtype in enumerate(inputs.split()))
    made = tuple(EngineTensor(f"o{i}", dtype) for i, dtype in enumerate(outputs.split()))
    return EngineLayer(name, "kgen", read, made, name, ("n",))


@pytest.mark.parametrize(
    ("layer", "op", "precision"),
    [
        (kernel("__myl_MulAdd_myl0_1", "Half Half", "Half"), "Add", "Half"),
        (kernel("__myl_MulAdd_myl0_1", "Half Float", "Half"), "Add", "mixed"),
        (kernel("__myl_CasMulCas_myl0_1", "Half", "Half"), "Mul", "mixed"),
        (kernel("__myl_CasMul_myl0_1", "Int64 Half", "Half"), "Mul", "Half"),
        (kernel("__myl_CasSinCas_myl0_1", "Int64 Float", "Half"), "Sin", "Float"),
        (kernel("__myl_CasCasSin_myl0_1", "Int64 Float", "Half"), "Sin", "mixed"),
        (kernel("__myl_CasMulMeaSqrCasMul_myl0_1", "Half Float", "Half"), "Sqrt", "Float"),
        (kernel("__myl_Gat_myl0_1", "Int64", "Int64"), "Gather", ""),
        (kernel("plugin", "", ""), "Mul", "unknown"),
        (kernel("plugin", "Complex", ""), "Mul", "unknown"),
    ],
)
def test_kernels_of_several_types(layer: EngineLayer, op: str, precision: str) -> None:
    contract = make_contract([layer], [NodeInfo("n", op, role="norm", dtype="float32")])
    assert contract.nodes[0].precision == precision


def test_a_cast_to_the_type_of_an_output_is_no_second_precision() -> None:
    layer = EngineLayer(
        "__myl_MulCas_myl0_1",
        "kgen",
        (EngineTensor("a", "Half"),),
        (EngineTensor("key_0", "Float"),),
        "",
        ("n",),
    )
    node = [NodeInfo("n", "Mul", role="rotary", dtype="float32")]
    assert make_contract(EngineText((layer,), ("key_0",)), node).nodes[0].precision == "Half"
    assert make_contract([layer], node).nodes[0].precision == "mixed"


def test_engines_whose_layers_name_no_nodes() -> None:
    contract = make_contract([EngineLayer("a", "kgen")], [NodeInfo("n", "MatMul", role="mlp")])
    assert contract.nodes[0].state == "absent"
    assert "name no ONNX nodes" in contract.remarks[0]
    assert make_contract([]).rows == ()


@given(st.sets(st.integers(0, 40)))
def test_ranges_hold_every_index(indices: set[int]) -> None:
    held: set[int] = set()
    for part in filter(None, ranges(indices).split(",")):
        first, _, last = part.partition("-")
        held |= set(range(int(first), int(last or first) + 1))
    assert held == indices


@pytest.mark.parametrize(
    ("module", "layer", "wanted"),
    [
        ("model.layers.3.mlp", 3, "model.layers.*.mlp"),
        ("block13.attn", 13, "block*.attn"),
        ("block13.attn", 3, "block13.attn"),
        ("model.norm", None, "model.norm"),
        ("", 2, ""),
    ],
)
def test_patterns_of_layers(module: str, layer: int | None, wanted: str) -> None:
    assert layer_pattern(module, layer) == wanted
