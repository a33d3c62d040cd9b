"""ONNX files: where weights may lie, what reading them costs, and what is said of damaged ones."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from divergence.errors import DivergenceError, SourceError
from divergence.probes.onnx import OnnxProbe
from tests.exports import observed

TOKENS, HEADS, LAYERS = 5, 4, 2


def random_model(width: int, layers: int = LAYERS) -> onnx.ModelProto:
    """A decoder without norms: attention and MLP of `width`, six `[width, width]` weights a layer."""
    generator = np.random.default_rng(0)
    nodes: list[Any] = []
    weights = [numpy_helper.from_array(np.array([1, TOKENS, HEADS, width // HEADS]), "heads")]
    weights += [numpy_helper.from_array(np.array([1, TOKENS, width]), "flat")]

    def add(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], name=f"/model/{output}/{kind}", **attributes))
        return output

    def project(value: str, name: str) -> str:
        weight = generator.standard_normal((width, width), dtype=np.float32) / width**0.5
        weights.append(numpy_helper.from_array(weight, f"{name}.weight"))
        return add("MatMul", [value, f"{name}.weight"], name)

    hidden = "x"
    for i in range(layers):
        layer, attention = f"layers.{i}", f"layers.{i}/self_attn"
        heads = {}
        for name, order in (("q", (0, 2, 1, 3)), ("k", (0, 2, 3, 1)), ("v", (0, 2, 1, 3))):
            split = add(
                "Reshape", [project(hidden, f"{attention}/{name}_proj"), "heads"], f"{attention}/{name}r"
            )
            heads[name] = add("Transpose", [split], f"{attention}/{name}t", perm=order)
        scores = add(
            "Softmax", [add("MatMul", [heads["q"], heads["k"]], f"{attention}/qk")], f"{attention}/p"
        )
        mixed = add("Transpose", [add("MatMul", [scores, heads["v"]], f"{attention}/pv")], f"{attention}/t",
                    perm=(0, 2, 1, 3))  # fmt: skip
        attended = project(add("Reshape", [mixed, "flat"], f"{attention}/r"), f"{attention}/o_proj")
        middle = add("Add", [hidden, attended], f"{layer}/middle")
        inner = add("Relu", [project(middle, f"{layer}/mlp/up_proj")], f"{layer}/mlp/act")
        hidden = add("Add", [middle, project(inner, f"{layer}/mlp/down_proj")], f"{layer}/out")
    add("Tanh", [hidden], "logits")
    shape = [1, TOKENS, width]
    graph = helper.make_graph(
        nodes,
        "random",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


WIDTH = 64
INPUTS = {"x": torch.linspace(-1, 1, TOKENS * WIDTH).view(1, TOKENS, WIDTH)}


def save(folder: Path, data: str = "") -> Path:
    """The small random model in `folder`, its weights in the file `data` if that is given."""
    path = folder / "model.onnx"
    (folder / data).parent.mkdir(parents=True, exist_ok=True)
    external: dict[str, Any] = {"save_as_external_data": True, "location": data, "size_threshold": 0}
    onnx.save(random_model(WIDTH), path, **(external if data else {}))
    return path


def refusal(path: Path, *, run: bool = False) -> str:
    """The one line that reading (or running) the file is refused with."""
    with pytest.raises(SourceError) as raised:
        probe = OnnxProbe(path)
        if run:
            observed(probe, INPUTS)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(str(path.parent)), message
    assert "; " in message, f"does not say how to mend it: {message}"
    return message


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, torch.Tensor]:
    """What the model gives with its weights embedded."""
    (tmp_path / "embedded").mkdir()
    seen = observed(OnnxProbe(save(tmp_path / "embedded")), INPUTS)
    assert len(seen) == 3 * LAYERS + 1
    return {site: o.tensor for site, o in seen.items()}


def _linked_folder(folder: Path) -> Path:
    """The folder of the data is a link to another place."""
    path = save(folder / "model", "weights/all.data")
    (folder / "model" / "weights").rename(folder / "elsewhere")
    (folder / "model" / "weights").symlink_to(folder / "elsewhere", target_is_directory=True)
    return path


def _linked_parent(folder: Path) -> Path:
    """The folder that holds model and data is itself reached through a link."""
    save(folder / "real", "all.data")
    (folder / "link").symlink_to(folder / "real", target_is_directory=True)
    return folder / "link" / "model.onnx"


def _linked_model(folder: Path) -> Path:
    """The model is a link; its data lies beside the file that it leads to."""
    real = save(folder / "real", "all.data")
    (folder / "other").mkdir()
    (folder / "other" / "link.onnx").symlink_to(real)
    return folder / "other" / "link.onnx"


def _linked_both(folder: Path) -> Path:
    """Model and data are links under their names to files under digests, as in a hub's cache."""
    real = save(folder / "snapshot", "all.data")
    (folder / "blobs").mkdir()
    for file, blob in ((real, "1f3a"), (real.parent / "all.data", "9c02")):
        file.rename(folder / "blobs" / blob)
        file.symlink_to(Path("..") / "blobs" / blob)
    return real


@pytest.mark.parametrize("arrange", [_linked_folder, _linked_parent, _linked_model, _linked_both])
def test_weights_behind_symbolic_links_are_found(
    arrange: Callable[[Path], Path], expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    seen = observed(OnnxProbe(arrange(tmp_path)), INPUTS)
    assert list(seen) == list(expected)
    assert all(torch.equal(seen[site].tensor, tensor) for site, tensor in expected.items())


def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link.onnx").symlink_to(tmp_path / "gone.onnx")
    assert "link.onnx: no such ONNX file; check the path" in refusal(tmp_path / "link.onnx")


def _folder(folder: Path) -> Path:
    (folder / "model.onnx").mkdir()
    return folder / "model.onnx"


def _written(content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "model.onnx").write_bytes(content)
        return folder / "model.onnx"

    return write


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_folder, "model.onnx: a folder; name the ONNX file in it"),
        (_written(b""), "the file is empty; export the model again"),
        (_written(b"no model\n" * 99), "not an ONNX file"),
        (_written(b"PK\x03\x04" + bytes(500)), "not an ONNX file"),
        (_written(bytes(500)), "not an ONNX file"),
        (
            _written(b"version https://git-lfs.github.com/spec/v1\n"),
            "Git LFS pointer, not the model; fetch it",
        ),
    ],
    ids=["folder", "empty", "text", "zip", "zeros", "lfs"],
)
def test_what_is_no_model_is_refused(make: Callable[[Path], Path], words: str, tmp_path: Path) -> None:
    assert words in refusal(make(tmp_path))


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole = save(tmp_path).read_bytes()
    path = tmp_path / "cut.onnx"
    for length in [1, 2, 3, *range(10, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert "cut.onnx" in refusal(path, run=True), length


def test_a_flipped_bit_never_ends_in_a_traceback(tmp_path: Path) -> None:
    """Whatever a damaged graph looks like, it is read or refused in one line."""
    path = save(tmp_path, "all.data")
    whole = path.read_bytes()
    messages = []
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            OnnxProbe(path).describe()
        except DivergenceError as error:
            messages.append(str(error))
    assert not [message for message in messages if "\n" in message]
    assert len(messages) > 100, "most flips do no harm: this test would show nothing"


def _placed(**place: str) -> Callable[[Path], Path]:
    """The model with one weight's external data described in another way."""

    def write(folder: Path) -> Path:
        path = save(folder, "all.data")
        model = onnx.load(path, load_external_data=False)
        (tensor,) = (t for t in model.graph.initializer if t.name == "layers.1/mlp/up_proj.weight")
        entries = {entry.key: entry.value for entry in tensor.external_data} | place
        del tensor.external_data[:]
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
        onnx.save(model, path)
        return path

    return write


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            _placed(location="gone.data"),
            "external data file 'gone.data' is missing (initializer '{name}'); copy",
        ),
        (
            _placed(location="../all.data"),
            "external data of '{name}' lies at '../all.data', outside the model's",
        ),
        (
            _placed(location="a/../../all.data"),
            "lies at 'a/../../all.data', outside the model's folder; save",
        ),
        (
            _placed(location="..\\all.data"),
            "lies at '../all.data', outside the model's folder; save the model",
        ),
        (_placed(location="/etc/hostname"), "lies at '/etc/hostname', outside the model's folder; save the"),
        (_placed(location=""), "outside the model's folder; save the model again"),
        (
            _placed(offset="999999999"),
            "all.data: external data is too short: initializer '{name}' ends at byte",
        ),
        (
            _placed(offset="-8"),
            "external data of '{name}' has offset '-8' and length '16384'; export the model",
        ),
        (
            _placed(offset="twelve"),
            "external data of '{name}' has offset 'twelve' and length '16384'; export",
        ),
        (
            _placed(length="999"),
            "external data of '{name}' has 999 bytes, its shape [64, 64] takes 16384; export",
        ),
    ],
    ids=lambda value: "" if callable(value) else value[:40],
)
def test_external_data_that_is_not_where_it_should_be(
    make: Callable[[Path], Path], words: str, tmp_path: Path
) -> None:
    assert words.format(name="layers.1/mlp/up_proj.weight") in refusal(make(tmp_path))


def test_external_data_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, "all.data")
    data = tmp_path / "all.data"
    data.write_bytes(data.read_bytes()[:-1])
    message = refusal(path)
    assert message.startswith(f"{data}: external data is too short: initializer '")
    assert message.endswith("; copy or export it again")


PEAK = """
import resource, sys
import numpy as np, onnxruntime, torch
from divergence.probes.onnx import OnnxProbe

inputs = np.linspace(-1, 1, int(sys.argv[3]), dtype=np.float32).reshape(1, -1, 1024)
if sys.argv[1] == "plain":
    session = onnxruntime.InferenceSession(sys.argv[2], providers=["CPUExecutionProvider"])
    session.run(None, {"x": inputs})
else:
    probe = OnnxProbe(sys.argv[2])
    for detail in (False, True):
        probe.run({"x": torch.from_numpy(inputs)}, lambda seen: None, detail=detail)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is a kibibyte on Linux only")
@pytest.mark.parametrize("data", ["", "all.data"], ids=["embedded", "external"])
def test_a_probe_takes_no_more_memory_than_a_plain_session(data: str, tmp_path: Path) -> None:
    """100 MB of weights, of which one copy more would show; runs with other outputs hold them once."""
    path = tmp_path / "model.onnx"
    external: dict[str, Any] = {"save_as_external_data": True, "location": data} if data else {}
    onnx.save(random_model(1024, layers=4), path, **external)

    def peak(kind: str) -> int:
        command = [sys.executable, "-c", PEAK, kind, str(path), str(TOKENS * 1024)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) >> 10

    assert peak("probe") - peak("plain") <= 32
