"""The ONNX probe, against tensors recorded from the PyTorch module by other means."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from divergence.captures import Capture
from divergence.errors import InputError, SourceError
from divergence.pipeline import record
from divergence.probes import silent
from divergence.probes.onnx import OnnxProbe
from divergence.probes.pytorch import PyTorchProbe
from tests.exports import exported, laid_out, observed
from tests.models import MODELS, inputs_for

KINDS = ("llama", "llama-eager", "gemma2", "qwen3", "gpt2", "bert", "opt")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An export of every kind, made when first asked for."""
    folder = tmp_path_factory.mktemp("exports")

    class Lazy(dict[str, Path]):
        def __missing__(self, kind: str) -> Path:
            self[kind] = exported(MODELS[kind](), inputs_for(kind), folder / f"{kind}.onnx")
            return self[kind]

    return Lazy()


def truth(model: Any, inputs: Mapping[str, Tensor], folder: Path) -> Capture:
    """The PyTorch module's own tensors; its probe is tested against transformers' caches."""
    return record(PyTorchProbe(model), inputs, folder / "ref.capture", detail=False, progress=silent)


def close(a: Tensor, b: Tensor) -> bool:
    """Equal to within fp32 rounding."""
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_site_of_an_export_holds_what_the_module_held(
    kind: str, exports: dict[str, Path], tmp_path: Path
) -> None:
    inputs = inputs_for(kind)
    reference = truth(MODELS[kind](), inputs, tmp_path)
    seen = observed(OnnxProbe(exports[kind]), inputs)
    for site in reference.sites:
        if site.layer is None:
            continue
        found = seen[str(site)]
        assert close(laid_out(found), reference.tensor(site)), (site, found.found)


def test_without_any_names_sites_are_found_by_value(exports: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.load(exports["llama"])
    for i, node in enumerate(model.graph.node):
        node.name = f"n{i}"
        del node.metadata_props[:]
    del model.graph.metadata_props[:]
    path = tmp_path / "bare.onnx"
    onnx.save(model, path)
    inputs = inputs_for("llama")
    with pytest.raises(SourceError, match="layer"):
        observed(OnnxProbe(path), inputs)
    reference = truth(MODELS["llama"](), inputs, tmp_path)
    seen = observed(OnnxProbe(path, reference=reference), inputs)
    for site in reference.sites:
        assert close(laid_out(seen[str(site)]), reference.tensor(site)), site
        assert site.layer is None or "value" in seen[str(site)].found


def test_outputs_of_equal_shape_in_another_order_are_told_apart(tmp_path: Path) -> None:
    class Two(torch.nn.Module):
        def __init__(self, *, swapped: bool) -> None:
            super().__init__()
            self.inner, self.swapped = MODELS["llama"](), swapped
            self.inner.config.use_cache = False
            self.config = self.inner.config

        def forward(self, input_ids: Tensor) -> Any:
            logits = self.inner(input_ids=input_ids).logits
            pair = (logits, logits * 2 + 1)
            return pair[::-1] if self.swapped else pair

    inputs = {"input_ids": inputs_for("llama")["input_ids"]}
    reference = truth(Two(swapped=False), inputs, tmp_path)
    path = exported(Two(swapped=True), inputs, tmp_path / "two.onnx")
    seen = observed(OnnxProbe(path, reference=reference), inputs)
    for name in ("output.0", "output.1"):
        site = next(s for s in reference.sites if str(s) == name)
        assert close(seen[name].tensor, reference.tensor(site)), name


def test_fetching_in_groups_changes_nothing(exports: dict[str, Path]) -> None:
    inputs = inputs_for("llama")
    at_once, one_by_one = (observed(OnnxProbe(exports["llama"], memory=m), inputs) for m in (1 << 30, 1))
    assert list(at_once) == list(one_by_one)
    assert all(torch.equal(at_once[s].tensor, one_by_one[s].tensor) for s in at_once)


def test_external_weights_stay_where_they_are(tmp_path: Path) -> None:
    inputs = inputs_for("llama")
    path = exported(MODELS["llama"](), inputs, tmp_path / "model.onnx", external=True)
    before = sorted(tmp_path.iterdir())
    seen = observed(OnnxProbe(path), inputs)
    assert len(seen) == 10
    assert sorted(tmp_path.iterdir()) == before
    next(tmp_path.glob("*.data")).unlink()
    with pytest.raises(SourceError, match=r"model\.onnx\.data"):
        OnnxProbe(path)


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.95])
def test_a_truncated_file_is_refused(keep: float, exports: dict[str, Path], tmp_path: Path) -> None:
    content = exports["llama"].read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(SourceError, match=r"cut\.onnx"):
        observed(OnnxProbe(path), inputs_for("llama"))


def test_what_is_no_onnx_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.onnx"
    path.write_text("this is no model\n" * 20)
    with pytest.raises(SourceError, match="ONNX"):
        OnnxProbe(path)
    with pytest.raises(SourceError, match=r"none\.onnx"):
        OnnxProbe(tmp_path / "none.onnx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "input_ids"),
        ({"input_ids": torch.zeros(2, 9)}, "int64"),
        ({"input_ids": torch.zeros(2, 9, 1, dtype=torch.int64)}, "shape"),
        ({"input_ids": torch.zeros(2, 8, dtype=torch.int64)}, "shape"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    change: dict[str, Any], message: str, exports: dict[str, Path]
) -> None:
    inputs = {n: t for n, t in {**inputs_for("llama"), **change}.items() if t is not None}
    with pytest.raises(InputError, match=message):
        observed(OnnxProbe(exports["llama"]), inputs)


def test_an_unknown_provider_is_refused(exports: dict[str, Path]) -> None:
    with pytest.raises(SourceError, match="CPUExecutionProvider"):
        OnnxProbe(exports["llama"], provider="NoSuchProvider")


def test_an_infinity_that_no_consumer_sees_is_said_to_be_one(tmp_path: Path) -> None:
    """On the CPU fp16 is added in fp32: 60000 + 60000 - 60000 is finite, its sum is not."""
    from divergence.probes.onnx.graph import Graph
    from divergence.probes.onnx.light import read_light
    from divergence.probes.onnx.session import Session
    from divergence.probes.onnx.unseen import unseen_infinities

    helper, half = onnx.helper, onnx.TensorProto.FLOAT16
    nodes = [
        helper.make_node("Add", ["x", "x"], ["sum"], name="sum"),
        helper.make_node("Sub", ["sum", "x"], ["y"], name="difference"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", half, [4])],
        [helper.make_tensor_value_info("y", half, [4])],
    )
    path = tmp_path / "inf.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    model = read_light(path)
    import onnxruntime

    feeds = {
        "x": onnxruntime.OrtValue.ortvalue_from_numpy(torch.full((4,), 60000.0, dtype=torch.float16).numpy())
    }

    def fetch(values: Any) -> Any:
        session = Session(model, Graph(model.proto), tuple(values), "CPUExecutionProvider", None)
        return session.in_groups(feeds, list(values), {}, 1 << 20)

    shown = next(iter(fetch(["sum"])))["sum"]
    assert torch.isinf(shown).all(), "onnxruntime shows the true sum now: this test would show nothing"
    reasons = unseen_infinities(Graph(model.proto, {"x": (4,)}), {"sum": ["layers.0.hidden"]}, fetch)
    assert "difference" in reasons["sum"] or "Sub" in reasons["sum"]


def test_two_runs_and_two_probes_agree(exports: dict[str, Path]) -> None:
    inputs = inputs_for("llama")
    probe = OnnxProbe(exports["llama"])
    first, second = observed(probe, inputs), observed(probe, inputs)
    observed(OnnxProbe(exports["gpt2"]), inputs_for("gpt2"))
    third = observed(OnnxProbe(exports["llama"]), inputs, detail=True)
    for site, seen in first.items():
        assert torch.equal(seen.tensor, second[site].tensor)
        assert close(seen.tensor, third[site].tensor)
    assert {"layers.1.query", "layers.1.attention", "layers.1.mlp"} <= set(third)


def test_numbers_of_element_types_are_those_of_the_format() -> None:
    from divergence.probes.onnx import graph

    names = {
        getattr(onnx.TensorProto, name): dtype
        for name, dtype in {
            "FLOAT": "float32",
            "DOUBLE": "float64",
            "FLOAT16": "float16",
            "BFLOAT16": "bfloat16",
            "FLOAT8E4M3FN": "float8_e4m3fn",
            "FLOAT8E4M3FNUZ": "float8_e4m3fnuz",
            "FLOAT8E5M2": "float8_e5m2",
            "FLOAT8E5M2FNUZ": "float8_e5m2fnuz",
        }.items()
    }
    assert names == graph.FLOATS
    assert {onnx.TensorProto.BOOL: "bool", onnx.TensorProto.STRING: "string"} == graph._OTHERS
    assert onnx.TensorProto.EXTERNAL == graph._EXTERNAL
    assert graph.dtype_name(onnx.TensorProto.INT64) == "int64"
