"""A model whose number of tokens is open."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def export_dynamic(path: Path) -> Path:
    """Two layers of one product each, `x` `[1, tokens, 32]`, hidden states named as sites."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((32, 32), dtype=np.float32) / 6 for _ in range(2)]
    shape: list[int | str | None] = [1, "tokens", 32]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w0"], ["layers.0.hidden"], name="first"),
            helper.make_node("MatMul", ["layers.0.hidden", "w1"], ["layers.1.hidden"], name="second"),
        ],
        "dynamic",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"layers.{n}.hidden", TensorProto.FLOAT, shape) for n in range(2)],
        [numpy_helper.from_array(w, f"w{n}") for n, w in enumerate(weights)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path
