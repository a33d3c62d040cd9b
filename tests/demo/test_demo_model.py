from __future__ import annotations

import gzip
import logging
import sys
import warnings
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from divergence.demo import BUNDLED, OUTPUTS, DemoDecoder, export, inputs, load, planted, write_bundled
from divergence.demo.model import DecoderLayer
from divergence.errors import SourceError

Array = NDArray[np.float64]
Outputs = dict[str, torch.Tensor]


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error."""
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def run_onnx(path: Path, feeds: dict[str, torch.Tensor]) -> Outputs:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(list(OUTPUTS), {name: t.numpy() for name, t in feeds.items()})
    return {name: torch.from_numpy(value) for name, value in zip(OUTPUTS, found, strict=True)}


@pytest.fixture(scope="module")
def model() -> DemoDecoder:
    return load()


@pytest.fixture(scope="module")
def expected(model: DemoDecoder) -> Outputs:
    return dict(model(**inputs()))


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("bundled")

    def written(name: str) -> Path:
        path = folder / f"{name}.onnx"
        if not path.exists():
            write_bundled(name, path)
        return path

    return written


def first_layer_by_hand(model: DemoDecoder, ids: Array) -> tuple[Array, Array]:
    """Key and value of layer 0 in float64 from the formulas, `[batch, kv_head, seq, head_dim]`."""
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    x = weights["embed_tokens.weight"][ids]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weights["layers.0.input_layernorm.weight"]
    batch, seq, _ = x.shape
    key, value = (
        (x @ weights[f"layers.0.self_attn.{name}_proj.weight"].T).reshape(batch, seq, 2, 32).swapaxes(1, 2)
        for name in ("k", "v")
    )
    turned = np.empty_like(key)
    for position in range(seq):
        for pair in range(16):
            angle = position * 10000.0 ** (-2 * pair / 32)
            a, b = key[:, :, position, pair], key[:, :, position, pair + 16]
            turned[:, :, position, pair] = a * np.cos(angle) - b * np.sin(angle)
            turned[:, :, position, pair + 16] = b * np.cos(angle) + a * np.sin(angle)
    return turned, value


def test_key_and_value_of_the_first_layer_are_what_the_formulas_give(
    model: DemoDecoder, expected: Outputs
) -> None:
    key, value = first_layer_by_hand(model, inputs()["input_ids"].numpy())
    # fp32 angles of up to 159 radians are off by up to 2^-17, which is the floor of the key.
    assert relative(expected["keys"][:, 0], torch.from_numpy(key)) < 1e-5
    assert relative(expected["values"][:, 0], torch.from_numpy(value)) < 1e-6


def test_outputs_have_the_documented_shapes(model: DemoDecoder) -> None:
    found = model(inputs(batch=2, tokens=7)["input_ids"])
    assert {name: tuple(t.shape) for name, t in found.items()} == {
        "keys": (2, 6, 2, 7, 32),
        "values": (2, 6, 2, 7, 32),
        "logits": (2, 7, 512),
    }


def test_fused_attention_agrees_with_the_one_written_out(expected: Outputs) -> None:
    fused = load(sdpa=True)(**inputs())
    for name in OUTPUTS:
        assert relative(fused[name], expected[name]) < 2e-6


@pytest.mark.parametrize("sdpa", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_at_the_tokens(sdpa: bool, side: str) -> None:
    model = load(sdpa=sdpa)
    feeds = inputs(tokens=20)
    alone = model(**feeds)
    pad = (5, 0) if side == "left" else (0, 5)
    padded = {name: torch.nn.functional.pad(t, pad) for name, t in feeds.items()}
    found = model(**padded)
    tokens = padded["attention_mask"].bool()[0]
    for name in ("keys", "values"):
        assert relative(found[name][..., tokens, :], alone[name]) < 1e-5
    assert relative(found["logits"][:, tokens], alone["logits"]) < 1e-5
    assert all(bool(t.isfinite().all()) for t in found.values())


def test_later_tokens_change_nothing_before_them(model: DemoDecoder) -> None:
    feeds = inputs(tokens=20)
    changed = feeds["input_ids"].clone()
    changed[:, 12:] += 1
    changed %= 512
    before, after = model(feeds["input_ids"]), model(changed)
    torch.testing.assert_close(before["logits"][:, :12], after["logits"][:, :12])
    assert not torch.equal(before["logits"][:, 12:], after["logits"][:, 12:])


def test_the_model_is_the_same_every_time_and_leaves_the_global_generator_alone(expected: Outputs) -> None:
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    again = load()(**inputs())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(again[name], expected[name]) for name in OUTPUTS)


def test_activations_stay_far_from_the_end_of_fp16(model: DemoDecoder) -> None:
    """The figure of DemoDecoder's docstring, and that the stream neither grows nor dies out."""
    largest, spread = [], []

    def look(module: torch.nn.Module, args: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            largest.append(float(output.abs().max()))
        elif isinstance(module, DecoderLayer) and isinstance(output, tuple):
            spread.append(float(output[0].std()))

    handles = [module.register_forward_hook(look) for module in model.modules()]
    found = model(**inputs())
    for handle in handles:
        handle.remove()
    largest += [float(t.abs().max()) for t in found.values()]
    assert max(largest) < 20
    assert 1 < min(spread) < max(spread) < 2


def test_half_precision_is_off_by_its_rounding_and_no_more(expected: Outputs) -> None:
    found = load(dtype=torch.float16)(**inputs())
    for name in OUTPUTS:
        assert found[name].dtype == torch.float16
        assert 1e-4 < relative(found[name], expected[name]) < 2e-3


def test_a_planted_rotary_fault_is_in_the_key_from_the_first_layer_on_and_not_in_its_value(
    model: DemoDecoder, expected: Outputs
) -> None:
    with planted(model, rotary_dtype=torch.bfloat16):
        found = model(**inputs())
    assert relative(found["keys"][:, 0], expected["keys"][:, 0]) > 1e-2
    assert torch.equal(found["values"][:, 0], expected["values"][:, 0])
    # The error grows with the position, as an error of the angle does.
    error = torch.linalg.vector_norm(found["keys"][:, 0] - expected["keys"][:, 0], dim=(0, 1, 3))
    assert error[-40:].mean() > 3 * error[1:40].mean()


def test_emulated_bf16_angles_are_those_of_bf16_arithmetic(model: DemoDecoder) -> None:
    positions = torch.arange(3000)[None]
    with planted(model, rotary_dtype=torch.bfloat16):
        emulated = model.rotary.angles(positions)
    truly = positions[:, :, None].bfloat16() * model.rotary.inv_freq.bfloat16()
    assert torch.equal(emulated, truly.float())


def test_a_planted_gain_is_in_one_value_and_faults_are_taken_out_again(
    model: DemoDecoder, expected: Outputs
) -> None:
    with planted(model, value_gain={3: 1.02}, rotary_dtype=torch.float32):
        found = model(**inputs())
    errors = [relative(found["values"][:, n], expected["values"][:, n]) for n in range(6)]
    assert errors[:3] == [0.0] * 3
    assert errors[3] == pytest.approx(0.02, rel=1e-3)
    restored = model(**inputs())
    assert all(torch.equal(restored[name], expected[name]) for name in OUTPUTS)


def test_the_bundled_clean_export_is_the_model(bundled: Callable[[str], Path], expected: Outputs) -> None:
    found = run_onnx(bundled("clean"), inputs())
    for name in OUTPUTS:
        assert relative(found[name], expected[name]) < 2e-6


def test_the_bundled_faulty_export_differs_where_it_should(
    bundled: Callable[[str], Path], model: DemoDecoder, expected: Outputs
) -> None:
    found = run_onnx(bundled("rotary-bf16"), inputs())
    assert relative(found["keys"][:, 0], expected["keys"][:, 0]) > 1e-2
    assert relative(found["values"][:, 0], expected["values"][:, 0]) < 1e-6
    with planted(model, rotary_dtype=torch.bfloat16):
        planted_outputs = model(**inputs())
    for name in OUTPUTS:
        assert relative(found[name], planted_outputs[name]) < 2e-6


def test_bundled_exports_take_any_batch_and_length_and_padding(
    bundled: Callable[[str], Path], model: DemoDecoder
) -> None:
    feeds = inputs(batch=3, tokens=11, seed=5)
    feeds["attention_mask"][0, 7:] = 0
    found, wanted = run_onnx(bundled("clean"), feeds), model(**feeds)
    tokens = feeds["attention_mask"].bool()
    assert relative(found["logits"][tokens], wanted["logits"][tokens]) < 2e-6


def test_bundled_graphs_keep_the_exporter_metadata_and_no_path_of_the_machine_that_made_them() -> None:
    for name in BUNDLED:
        packed = resources.files("divergence.demo").joinpath(f"{name}.onnx.gz").read_bytes()
        assert len(packed) < 40_000
        graph = onnx.load_model_from_string(gzip.decompress(packed))
        keys = {entry.key for node in graph.graph.node for entry in node.metadata_props}
        assert {"namespace", "pkg.torch.onnx.name_scopes"} <= keys
        assert b".py" not in gzip.decompress(packed)


def test_an_unknown_bundled_export_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="did you mean 'clean'"):
        write_bundled("claen", tmp_path / "x.onnx")


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be written"):
        write_bundled("clean", tmp_path / "missing" / "x.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BUNDLED))
def test_exporting_anew_gives_the_bundled_graph(
    name: str, bundled: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Run `python -m divergence.demo.make_graphs` if this fails after a change of the model."""
    fresh = tmp_path / "fresh.onnx"
    streams, level, filters = sys.stdout, logging.getLogger("torch.onnx").level, list(warnings.filters)
    export(fresh, rotary_dtype=BUNDLED[name])
    assert capfd.readouterr() == ("", "")
    assert (sys.stdout, logging.getLogger("torch.onnx").level) == (streams, level)
    assert list(warnings.filters) == filters
    found, wanted = run_onnx(fresh, inputs()), run_onnx(bundled(name), inputs())
    for output in OUTPUTS:
        assert torch.equal(found[output], wanted[output])


@pytest.mark.parametrize(
    ("raised", "said"),
    [(ImportError("no onnxscript"), "install onnxscript"), (RuntimeError("no\nluck"), "RuntimeError: no")],
)
def test_an_export_that_fails_is_a_source_error(
    raised: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        print("chatter")
        raise raised

    monkeypatch.setattr(torch.onnx, "export", fail)
    stdout = sys.stdout
    with pytest.raises(SourceError, match=f"the bundled model cannot be exported.*{said}"):
        export(tmp_path / "x.onnx")
    assert sys.stdout is stdout
