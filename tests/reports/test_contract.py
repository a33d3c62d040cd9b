from __future__ import annotations

import pytest

from divergence.probes.tensorrt.contract import Contract, make_contract
from divergence.probes.tensorrt.inspector import EngineLayer
from divergence.reports.contract import render_contract
from tests.probes.recorded_engine import engine, nodes


@pytest.fixture(scope="module")
def fp16() -> Contract:
    return make_contract(engine("scale-fp16"), nodes("scale-fp16"), "fp16")


def lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_one_row_for_each_kind_of_module(fp16: Contract) -> None:
    text = lines(render_contract(fp16, 140))
    assert text[0] == "Contract: what the engine of 219 layers, built for fp16, does with each module"
    kernel = "__myl_CasResMulConSinResCosResResResSliNegSli..."
    projections = "layers.*.self_attn.q_proj, k_proj, v_proj"
    for line in (
        f"rotary Half, asked Float; {kernel}",
        f"{projections} layers 0-17: Half, sums in Float; sm90_xmma_gemm_f16f16_f16f32_f32",
        "layers.*.self_attn softmax layers 0-17: Half; _gemm_mha_v2",
        "layers.*.self_attn attention product layers 0-17: Half, accumulator unknown; _gemm_mha_v2",
        "layers.*.mlp.up_proj layers 0-17: Half, sums in Half; sm90_xmma_gemm_f16f16_f16f16_f16",
        f"- rotary angles asked for Float, ran as Half inside {kernel}",
        "- 2 casts Float -> Half: x, mask",
        "- 18 kernels of products of Half sum in Half",
    ):
        assert line in text, "\n".join(text)
    assert len(text) < 40


def test_json_values_render_the_same(fp16: Contract) -> None:
    assert render_contract(fp16.to_json(), 100) == render_contract(fp16, 100)


@pytest.mark.parametrize("width", [10, 40, 73, 100, 200])
@pytest.mark.parametrize("name", ["scale-fp16", "bf16"])
def test_no_line_is_wider_than_the_page(width: int, name: str) -> None:
    text = render_contract(make_contract(engine(name), nodes(name), "bf16"), width, ascii=True)
    assert text.isascii()
    assert max(len(line) for line in text.splitlines()) <= max(width, 40)


def test_without_descriptions_there_is_a_remark() -> None:
    text = " ".join(render_contract(make_contract(engine("fp32_tf32on")), 100).split())
    assert "projection TF32, sums in Float" in text
    assert "attention product Float (8), TF32 (16), sums in Float" in text
    assert "no description of its ONNX nodes" in text


def test_an_empty_contract_says_so() -> None:
    text = render_contract(make_contract([EngineLayer("a")]), 80)
    assert "no ONNX node could be traced" in text and "1 layer does" in text.replace(",", "")
    assert "no ONNX node could be traced" in render_contract({}, 80)


def test_names_cannot_command_the_terminal() -> None:
    layer = EngineLayer("k\x1b[31m\nx", "kgen", onnx_nodes=("/layers.0/\x1b[2J/Softmax",))
    text = render_contract(make_contract([layer]), 100)
    assert "\x1b" not in text and "Softmax" not in text.split("\n")[0]
