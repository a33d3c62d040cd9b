"""Engines on a real device. Everything here needs TensorRT and a GPU; docs/tensorrt.md says how to run it."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from divergence.config import Config
from divergence.demo import load
from divergence.errors import ConfigurationError, InputError, SourceError
from divergence.pipeline import compare
from divergence.probes import Observation
from divergence.probes.tensorrt.build import BuildOptions, build_engine, parse_shapes
from divergence.probes.tensorrt.options import EngineOptions
from divergence.probes.tensorrt.probe import TensorRTProbe
from divergence.probes.tensorrt.process import Worker
from divergence.probes.tensorrt.sidecar import beside, load_sidecar
from tests.tensorrt.engines import INPUTS, alone, engine, folder, onnx
from tests.tensorrt.quantised import quantise

pytestmark = [pytest.mark.tensorrt, pytest.mark.slow]

BROKEN = Path(__file__).with_name("broken_host.py")


def run(plan: Path, **options: object) -> tuple[dict[str, torch.Tensor], object]:
    seen: dict[str, torch.Tensor] = {}
    facts = TensorRTProbe(plan, options=EngineOptions(**options)).run(  # type: ignore[arg-type]
        INPUTS, lambda o: seen.__setitem__(str(o.site), o.tensor.clone())
    )
    return seen, facts


def test_an_fp32_engine_without_tf32_passes() -> None:
    result = compare(load(), str(engine("fp32")), INPUTS, config=Config())
    assert result.verdict == "pass", result.reason
    assert {f"layers.{n}.{t}" for n in range(6) for t in ("key", "value", "hidden")} <= {
        s.site for s in result.sites
    }
    assert result.policy.precision == "fp32"
    assert result.contract


def test_tf32_is_judged_as_tf32() -> None:
    result = compare(load(), str(engine("tf32")), INPUTS, config=Config())
    assert result.policy.precision == "tf32"
    assert result.verdict == "pass", result.reason
    assert result.site("layers.5.hidden").rel_l2 > 1e-5  # type: ignore[operator] # a number here


def test_a_planted_fault_is_found_in_an_engine() -> None:
    result = compare(load(), str(engine("fp32", fault="rotary-bf16")), INPUTS, config=Config())
    assert result.verdict == "fail"
    assert result.first_divergence is not None
    assert result.first_divergence.site == "layers.0.key"


def test_looking_is_checked_against_the_plain_engine() -> None:
    _, facts = run(engine("fp16"))
    observer = facts.details["observer"]  # type: ignore[attr-defined]
    assert set(observer["outputs"]) == {"keys", "values", "logits"}
    assert observer["changed"] == (not all(o["bit_equal"] for o in observer["outputs"].values()))


def test_debug_tensors_show_what_outputs_show() -> None:
    outputs, _ = run(engine("fp32"))
    debug, _ = run(engine("fp32", "debug"))
    assert set(outputs) == set(debug)
    for site, tensor in outputs.items():
        assert torch.allclose(tensor.float(), debug[site].float(), rtol=1e-3, atol=1e-3), site


def test_an_engine_without_a_sidecar_gives_its_outputs_and_advice() -> None:
    plan = alone(engine("fp32", "none"), "bare.plan")
    seen, facts = run(plan)
    assert set(seen) == {"output.keys", "output.values", "output.logits"}
    assert any("divergence build" in note for note in facts.notes)  # type: ignore[attr-defined]
    assert facts.precision == "fp32"  # type: ignore[attr-defined]
    result = compare(load(), str(plan), INPUTS, config=Config(), exclude=("layers.*.hidden",))
    assert result.verdict == "pass", result.reason
    assert result.site("layers.3.key").layout


def test_hosts_agree_to_the_bit_and_have_no_hazard() -> None:
    pytest.importorskip("pycuda")
    _, facts = run(engine("fp32"), host="both")
    hazard = facts.details["stream_hazard"]  # type: ignore[attr-defined]
    assert hazard == {"looked": True, "hazard": False, "evidence": [], "hosts": ["torch", "pycuda"]}


def test_a_pycuda_host_in_its_own_context() -> None:
    pytest.importorskip("pycuda")
    torch_seen, _ = run(engine("fp32"))
    seen, _ = run(engine("fp32"), host="pycuda", context="own")
    for site, tensor in torch_seen.items():
        assert torch.equal(tensor, seen[site]), site


@pytest.mark.parametrize("host", ["UploadElsewhere", "ReadTooEarly"])
def test_a_broken_host_is_caught(host: str) -> None:
    caught = 0
    with Worker() as worker:
        for _ in range(10):
            probe = TensorRTProbe(
                engine("fp32"), options=EngineOptions(host=f"{BROKEN}:{host}"), runner=worker
            )
            facts = probe.run(INPUTS, lambda _: None)
            caught += facts.details["stream_hazard"]["hazard"]
    assert caught >= 9


def test_damaged_plans_are_errors_and_harm_nobody() -> None:
    whole = engine("fp32", "none")
    content = whole.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0xFF
    cases = {
        "cut.plan": content[: len(content) // 2],
        "text.plan": b"not an engine\n" * 99,
        "empty.plan": b"",
    }
    for name, data in cases.items():
        path = folder() / name
        path.write_bytes(data)
        with pytest.raises(SourceError, match=name):
            run(path)
    described = folder() / "flipped.plan"
    described.write_bytes(bytes(flipped))
    beside(described).write_text(beside(whole).read_text())
    with pytest.raises(SourceError, match="is not the plan that"):
        run(described)


def test_the_command_line_ends_with_status_2_on_a_cut_plan(tmp_path: Path) -> None:
    path = tmp_path / "cut.plan"
    path.write_bytes(engine("fp32", "none").read_bytes()[:-5000])
    done = subprocess.run(
        [sys.executable, "-c", "from divergence.cli import main; main()", "inspect", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}: ")
    assert done.stderr.count("\n") == 1


def test_a_worker_that_is_killed_loses_nothing_but_itself() -> None:
    with Worker() as worker, pytest.raises(SourceError, match="was killed by SIGABRT"):
        worker.call("tests.tensorrt.jobs:abort", {}, about="engine.plan")


def test_inputs_that_do_not_fit() -> None:
    probe = TensorRTProbe(engine("fp32"))
    with pytest.raises(InputError, match="attention_mask"):
        probe.run({"input_ids": INPUTS["input_ids"]}, lambda _: None)
    with pytest.raises(InputError, match="shape"):
        probe.run({name: t[:, :7] for name, t in INPUTS.items()}, lambda _: None)
    with pytest.raises(InputError, match="no profile 3"):
        TensorRTProbe(engine("fp32"), options=EngineOptions(profile=3)).run(INPUTS, lambda _: None)


def test_a_missing_plugin_library_is_named() -> None:
    with pytest.raises(SourceError, match="libnone.so"):
        run(engine("fp32"), plugins=("libnone.so",))


def test_the_sidecar_and_the_timing_cache(tmp_path: Path) -> None:
    out, cache = tmp_path / "a.plan", tmp_path / "timing.cache"
    options = BuildOptions(precision="fp16", level=1, timing_cache=str(cache), plain=False)
    sidecar = build_engine(onnx(), out, options, inputs=INPUTS)
    assert cache.stat().st_size > 0
    assert load_sidecar(out) == sidecar
    assert len(sidecar.outputs) == 18
    assert sidecar.built["tensorrt"]
    seen, _ = run(out)
    assert "layers.5.hidden" in seen
    assert json.loads(beside(out).read_text())["options"]["level"] == 1


def test_int8_without_quantisation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="QuantizeLinear"):
        build_engine(onnx(), tmp_path / "a.plan", BuildOptions(precision="int8"), inputs=INPUTS)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantised_engines_run_and_are_judged_as_such(kind: str, tmp_path: Path) -> None:
    model = quantise(onnx(), tmp_path / f"{kind}.onnx", kind)
    plan = tmp_path / f"{kind}.plan"
    build_engine(model, plan, BuildOptions(precision=kind, plain=False), inputs=INPUTS)
    result = compare(load(), str(plan), INPUTS, config=Config(), diagnose=False)
    assert result.policy.precision == kind
    layers = [site for site in result.sites if site.layer is not None]
    assert len(layers) == 18
    for site in layers[:2]:  # what TensorRT makes of the rest is for it to answer for
        assert site.rel_l2 is not None
        assert 1e-4 < site.rel_l2 < 0.3, site.site


def test_a_library_without_plugins_changes_nothing(tmp_path: Path) -> None:
    source, library = tmp_path / "own.c", tmp_path / "libown.so"
    source.write_text("int divergence_test_library;\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    seen, _ = run(engine("fp32"), plugins=(str(library),))
    assert "layers.5.hidden" in seen


def test_a_broken_host_on_the_command_line_is_named_as_the_cause(tmp_path: Path) -> None:
    given = tmp_path / "inputs.safetensors"
    save_file(INPUTS, given)
    command = ["compare", "--ref", "pytorch:divergence.demo:load", "--cand", str(engine("fp32"))]
    command += ["--inputs", str(given), "--host", f"{BROKEN}:UploadElsewhere", "--hazards"]
    command += ["--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", "from divergence.cli import main; main()", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["environment"]["candidate"]["stream_hazard"]["hazard"], done.stderr
    if done.returncode == 1:
        assert "stream_hazard" in [cause["id"] for cause in report["causes"]]


def test_inspect_tells_sites_and_contract() -> None:
    description = TensorRTProbe(engine("fp16")).describe()
    assert description.precision == "fp16"
    assert any(str(info.site) == "layers.3.key" for info in description.sites)
    assert description.contract


def test_dynamic_shapes_need_a_profile(tmp_path: Path) -> None:
    from tests.tensorrt.dynamic import export_dynamic

    path = export_dynamic(tmp_path / "dynamic.onnx")
    with pytest.raises(ConfigurationError, match="--shape"):
        build_engine(path, tmp_path / "a.plan", BuildOptions(plain=False))
    options = BuildOptions(plain=False, profiles=parse_shapes(["x=1x1x32,1x16x32,1x64x32"]))
    build_engine(path, tmp_path / "b.plan", options)
    hosts = ["torch", "pycuda"] if importlib.util.find_spec("pycuda") else ["torch"]
    for tokens, host in itertools.product((1, 16, 64), hosts):
        shapes: list[int] = []

        def sink(observation: Observation, shapes: list[int] = shapes) -> None:
            shapes.append(observation.tensor.shape[1])

        probe = TensorRTProbe(tmp_path / "b.plan", options=EngineOptions(host=host))
        probe.run({"x": torch.randn(1, tokens, 32)}, sink)
        assert shapes == [tokens, tokens]
    with pytest.raises(InputError, match="from \\[1, 1, 32\\] to \\[1, 64, 32\\]"):
        TensorRTProbe(tmp_path / "b.plan").run({"x": torch.randn(1, 65, 32)}, lambda _: None)
