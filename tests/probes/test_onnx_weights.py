"""Weights of ONNX graphs: those of the modules that were exported, however exporters keep them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from divergence.diagnosis import OwnWeights
from divergence.probes.onnx import OnnxProbe
from tests.exports import exported
from tests.models import MODELS, inputs_for
from tests.smollm2 import quiet

pytestmark = pytest.mark.filterwarnings("ignore")


def projections(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of two axes in the layers."""
    return {
        n: p
        for n, p in model.named_parameters()
        if p.dim() == 2 and n.endswith("weight") and "embed" not in n
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2", "llama-eager", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_export_has_the_weights_of_its_module(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = MODELS[kind]().to(dtype)
    path = exported(model, inputs_for(kind), tmp_path / "m.onnx", external=dtype is torch.float16)
    own = OwnWeights(model, OnnxProbe(path).weights())
    layers = {n: p for n, p in projections(model).items() if ".0." in n or ".1." in n}
    assert len(layers) >= 8
    for name, parameter in layers.items():
        found = own.of(parameter)
        assert found is not None, name
        assert found.dtype == dtype
        assert torch.equal(found, parameter.detach()), name


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.down(torch.relu(self.up(x)))
        return x + made


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_the_torchscript_exporter_keeps_them_transposed_and_without_a_name(tmp_path: Path) -> None:
    model = Blocks().eval()
    with quiet():
        torch.onnx.export(model, (torch.rand(2, 4, 8),), str(tmp_path / "m.onnx"), dynamo=False)
    own = OwnWeights(model, OnnxProbe(tmp_path / "m.onnx").weights())
    for name, parameter in projections(model).items():
        found = own.of(parameter)
        assert found is not None and torch.equal(found, parameter), name


def quantized(model: nn.Module, tmp_path: Path, **options: Any) -> Path:
    """The export of `model`, its weights quantised by onnxruntime on random inputs."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = [{"x": torch.rand(2, 4, 8).numpy()} for _ in range(2)]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    with quiet():
        torch.onnx.export(
            model, (torch.rand(2, 4, 8),), str(tmp_path / "m.onnx"), dynamo=True, input_names=["x"]
        )
        quantize_static(tmp_path / "m.onnx", tmp_path / "q.onnx", Reader(), **options)
    return tmp_path / "q.onnx"


@pytest.mark.parametrize("per_channel", [False, True])
def test_quantised_weights_are_what_they_stand_for(per_channel: bool, tmp_path: Path) -> None:
    model = Blocks().eval()
    path = quantized(model, tmp_path, per_channel=per_channel)
    own = OwnWeights(model, OnnxProbe(path).weights())
    for name, parameter in projections(model).items():
        found = own.of(parameter)
        assert found is not None, name
        steps = parameter.detach().abs().amax(1 if per_channel else (0, 1), keepdim=True) / 127
        assert bool(((found - parameter).abs() <= 0.51 * steps).all()), name
        assert not torch.equal(found, parameter)


def dequantizing(array: Any, scale: Any, zero: Any, opset: int, **attributes: Any) -> onnx.ModelProto:
    """A graph of one layer whose weight is a DequantizeLinear of constants."""
    named = {"w_quantized": array, "w_scale": scale, "w_zero_point": zero}
    nodes = [
        helper.make_node("DequantizeLinear", list(named), ["w"], **attributes),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="/layers.0/up/MatMul"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, array.shape[0]])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("y", "w")],
        [numpy_helper.from_array(value, name) for name, value in named.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


@given(
    axis=st.sampled_from([0, 1, -1]),
    kind=st.sampled_from(["tensor", "axis", "block"]),
    whole=st.sampled_from([np.int8, np.uint8]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_dequantisation_is_onnx_s_own(
    axis: int, kind: str, whole: Any, seed: int, tmp_path_factory: Any
) -> None:
    rng = np.random.default_rng(seed)
    shape, block = (6, 8), 2
    scale_shape: tuple[int, ...] = {
        "tensor": (),
        "axis": (shape[axis],),
        "block": tuple(n // block if i == axis % 2 else n for i, n in enumerate(shape)),
    }[kind]
    info = np.iinfo(whole)
    array = rng.integers(info.min, info.max, shape, dtype=whole, endpoint=True)
    scale = rng.uniform(0.01, 0.1, scale_shape).astype(np.float32)
    zero = rng.integers(info.min, info.max, scale_shape, dtype=whole, endpoint=True)
    attributes = {"axis": axis} | ({"block_size": block} if kind == "block" else {})
    model = dequantizing(array, np.asarray(scale), np.asarray(zero, whole), 21, **attributes)
    path = tmp_path_factory.mktemp("dq") / "m.onnx"
    onnx.save(model, path)
    weights = OnnxProbe(path).weights()
    expected: Any
    _, expected = ReferenceEvaluator(model).run(None, {"x": np.zeros((2, 6), np.float32)})
    np.testing.assert_allclose(weights["w"].numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(weights["layers.0.up.weight"].numpy(), expected, rtol=1e-6)
    assert weights.is_multiplied("layers.0.up.weight") and not weights.is_multiplied("w")


def test_what_is_not_made_of_constants_is_no_weight(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"], name="/layers.0/up/MatMul"),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 4]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    weights = OnnxProbe(path).weights()
    assert list(weights) == []
    with pytest.raises(KeyError):
        weights["layers.0.up.weight"]
