from __future__ import annotations

import gzip
import json
import string
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from divergence.errors import SourceError
from divergence.probes.tensorrt.inspector import (
    EngineLayer,
    EngineTensor,
    parse_inspector,
    parse_tactic,
    split_metadata,
    word,
)
from tests.probes.recorded_engine import DATA, engine


# Read by hand from the recordings: layers, bindings, ONNX nodes, GEMM tactics by precision and accumulator.
@pytest.mark.parametrize(
    ("name", "layers", "bindings", "nodes", "gemms"),
    [
        ("scale-fp16", 219, 57, 1032, {("Half", "Float"): 72, ("Half", "Half"): 18}),
        ("scale-typed_fp16", 217, 57, 1106, {("Half", "Float"): 54, ("Half", "Half"): 36}),
        ("bf16", 115, 26, 456, {("BFloat16", "Float"): 32}),
        ("fp32_tf32on", 106, 26, 456, {("TF32", "Float"): 48}),
    ],
)
def test_recordings(
    name: str, layers: int, bindings: int, nodes: int, gemms: dict[tuple[str, str], int]
) -> None:
    text = engine(name)
    assert (len(text.layers), len(text.bindings)) == (layers, bindings)
    assert len({node for layer in text.layers for node in layer.onnx_nodes}) == nodes
    found = Counter((g.precision, g.accumulator) for layer in text.layers if (g := layer.gemm))
    assert found == gemms


def test_a_layer_of_a_recording() -> None:
    layers = engine("scale-fp16").layers
    rotary = layers[5]
    assert rotary.kind == "kgen"
    assert rotary.inputs[3] == EngineTensor("pos", "Int64", (970,))
    assert rotary.inputs[1] == EngineTensor("unsqueeze_1_constantHalf", "Half", (1, 128))
    assert rotary.operations[:7] == ("Cas", "Res", "Mul", "Con", "Sin", "Res", "Cos")
    assert rotary.operations[-1] == "Etc"
    assert rotary.onnx_nodes[0] == "node__to_copy_1"
    assert {"node_view", "node_transpose"} <= set(rotary.onnx_nodes)  # behind the second separator
    assert layers[7].is_attention and layers[7].kernel == "_gemm_mha_v2"
    assert layers[4].kernel == "sm90_xmma_gemm_f16f16_f16f32_f32"
    assert sum(layer.is_attention for layer in layers) == 18


@pytest.mark.parametrize(
    ("tactic", "operands", "precision", "accumulator", "output"),
    [
        ("sm90_xmma_gemm_f16f16_f16f16_f16_tn_n_tilesize64x64x64", "Half", "Half", "Half", "Half"),
        ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize64x64x64", "Half", "Half", "Float", "Half"),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "BFloat16", "BFloat16", "Float", "BFloat16"),
        ("sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n_tilesize32x32x64", "Float", "TF32", "Float", "Float"),
        ("sm80_xmma_gemm_f32f32_f32f32_f32_nn_n_ffma", "Float", "Float", "Float", "Float"),
        ("sm80_xmma_gemm_i8i8_i8i32_f32_tn_n", "Int8", "Int8", "Int32", "Int8"),
        ("sm90_xmma_gemm_e4m3e4m3_e4m3f32_f32_tn_n", "FP8", "FP8", "Float", "FP8"),
        ("sm90_xmma_gemm_e4m3e4m3_bf16f32_f32", "FP8", "FP8", "Float", "BFloat16"),
    ],
)
def test_types_of_tactics(tactic: str, operands: str, precision: str, accumulator: str, output: str) -> None:
    found = parse_tactic(tactic)
    assert found is not None
    assert found.operands == (operands, operands)
    assert (found.precision, found.accumulator, found.output) == (precision, accumulator, output)


@pytest.mark.parametrize(
    "tactic",
    ["", "_gemm_mha_v2_0x65f2", "__myl_MulAdd_0xcf4e", "sm99_gemm_f12f12_f12f12_f12_tn", "gemm_f16f16_f16"],
)
def test_tactics_that_state_no_types(tactic: str) -> None:
    assert parse_tactic(tactic) is None


names = st.text(string.ascii_letters + string.digits + "_/.:[ ", min_size=1).map(str.strip).filter(bool)


@given(st.lists(names, max_size=12), st.data())
def test_metadata_is_split_at_both_separators(wanted: list[str], data: st.DataObject) -> None:
    text = ""
    for name in wanted:
        text += data.draw(st.sampled_from(["\x1e", "\x1f"])) if text else ""
        text += f"[ONNX Layer: {name}]"
    assert split_metadata(text) == tuple(dict.fromkeys(wanted))


def test_metadata_of_other_kinds_is_left_out() -> None:
    assert split_metadata("") == ()
    assert split_metadata("[BACKEND: x]\x1f[ONNX Layer: a]\x1f\x1e[ONNX Layer: ]") == ("a",)


@given(st.data())
def test_a_text_cut_off_anywhere_is_an_error(data: st.DataObject) -> None:
    text = gzip.decompress((DATA / "bf16.json.gz").read_bytes()).decode()
    cut = data.draw(st.integers(0, len(text.rstrip()) - 1))
    with pytest.raises(SourceError, match="cut off"):
        parse_inspector(text[:cut], "e.plan")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "no list 'Layers'"),
        ("null", "no list 'Layers'"),
        ('{"Layers": {}}', "no list 'Layers'"),
        ('{"Layers": [], "Bindings": ["x"]}', "shows no layers; build with profiling verbosity DETAILED"),
        ('{"Layers": ["a", "b"]}', "names of layers only; build with profiling verbosity DETAILED"),
        ('{"Layers": [{"Name": "a"}, "b"]}', "DETAILED"),
    ],
)
def test_texts_that_say_too_little(text: str, message: str) -> None:
    with pytest.raises(SourceError, match=message) as error:
        parse_inspector(text, "engine.plan")
    assert str(error.value).startswith("engine.plan: ") and "\n" not in str(error.value)


def test_missing_and_odd_keys() -> None:
    found = [
        {},
        {
            "Name": 3,
            "Inputs": "x",
            "Outputs": [None, {"Name": "y", "Dimensions": [1, "n", 2]}],
            "Metadata": None,
        },
    ]
    layers = parse_inspector(json.dumps({"Layers": found})).layers
    assert layers[0] == EngineLayer("")
    assert layers[1].outputs == (EngineTensor("y", "", (1, 2)),)
    assert not layers[1].outputs[0].floating


def test_separators_may_stand_raw_in_the_text() -> None:
    text = '{"Layers":[{"Name":"a","Metadata":"[ONNX Layer: x]\x1f[ONNX Layer: y]"}]}'
    assert parse_inspector(text).layers[0].onnx_nodes == ("x", "y")


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("Half", "Half"),
        ("Row major linear FP16 format", "Half"),
        ("Row major linear FP32", "Float"),
        ("Channel major INT8 format where channel % 32 == 0", "Int8"),
        ("bfloat16", "BFloat16"),
        ("float16", "Half"),
        ("float32", "Float"),
        ("float8_e4m3fn", "FP8"),
        ("uint8", "UInt8"),
        ("Complex", "Complex"),
        ("", ""),
    ],
)
def test_words_for_types(written: str, wanted: str) -> None:
    assert word(written) == wanted
