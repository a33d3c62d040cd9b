"""The probe of engines, with a stand-in for the process that would run them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from divergence import demo
from divergence.config import Config
from divergence.errors import ConfigurationError, DivergenceError, InputError, SourceError
from divergence.pipeline import compare
from divergence.probes import Progress, RunFacts, silent
from divergence.probes.tensorrt.options import EngineOptions
from divergence.probes.tensorrt.probe import TensorRTProbe
from divergence.probes.tensorrt.sidecar import beside, load_sidecar
from tests.tensorrt.stand_in import StandIn, write_engine, write_plan

INPUTS = demo.inputs(tokens=24)


def run(probe: TensorRTProbe) -> tuple[dict[str, torch.Tensor], RunFacts]:
    seen: dict[str, torch.Tensor] = {}
    facts = probe.run(INPUTS, lambda o: seen.__setitem__(str(o.site), o.tensor.clone()))
    return seen, facts


def probe(
    folder: Path, *, plain: bool = False, options: EngineOptions | None = None, **how: Any
) -> TensorRTProbe:
    plan = write_engine(folder, plain=plain)
    return TensorRTProbe(plan, options=options, runner=StandIn(folder, **how))


def test_a_clean_engine_passes_and_its_contract_is_in_the_report(tmp_path: Path) -> None:
    result = compare(demo.load(), probe(tmp_path), INPUTS, config=Config())
    assert result.verdict == "pass", result.reason
    assert {f"layers.{n}.{t}" for n in range(6) for t in ("key", "value", "hidden")} < {
        s.site for s in result.sites
    }
    assert result.environment["candidate"]["latency_ms"] == 1.25
    assert "contract" not in result.environment["candidate"]
    assert result.contract["engine_layers"] > 0


def test_a_wrong_engine_fails_at_the_site_that_is_wrong(tmp_path: Path) -> None:
    plan = write_engine(tmp_path, content=b"changed")
    result = compare(
        demo.load(), TensorRTProbe(plan, runner=StandIn(tmp_path)), INPUTS, config=Config(), diagnose=False
    )
    assert result.verdict == "fail"
    assert result.first_divergence is not None
    assert result.first_divergence.site == "layers.1.value"


def test_precision_comes_from_the_sidecar_and_else_from_the_engine(tmp_path: Path) -> None:
    with_sidecar = probe(tmp_path)
    assert with_sidecar.describe().precision == "fp32"
    beside(with_sidecar.path).unlink()
    bare = TensorRTProbe(with_sidecar.path, runner=StandIn(tmp_path))
    assert bare.describe().precision == "bf16", "the recorded text is of a bf16 engine"


def test_an_engine_of_final_outputs_says_what_would_show_more(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "bare.plan")
    demo.write_bundled("clean", tmp_path / "m.onnx")
    _, facts = run(TensorRTProbe(plan, runner=StandIn(tmp_path, only=("logits",))))
    assert any("divergence build" in note and "final outputs only" in note for note in facts.notes)


def test_an_engine_of_keys_and_values_is_judged_on_them(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "kv.plan")
    demo.write_bundled("clean", tmp_path / "m.onnx")
    stand_in = StandIn(tmp_path, only=("keys", "values", "logits"))
    result = compare(
        demo.load(),
        TensorRTProbe(plan, runner=stand_in),
        INPUTS,
        config=Config(),
        precision="fp32",
        exclude=("layers.*.hidden",),
    )
    assert result.verdict == "pass", result.reason
    assert result.site("layers.4.key").layout
    assert any("no hidden states" in note for note in result.notes)


def test_what_the_engine_never_wrote_and_what_varies_is_named(tmp_path: Path) -> None:
    facts = {"unwritten": {"keys": 7}, "varying": {"logits": 3}}
    _, seen = run(probe(tmp_path, facts=facts))
    assert "The engine never wrote 7 elements of its tensor keys: they still hold the poison." in seen.notes
    assert any(note.startswith("3 elements of logits changed from run to run") for note in seen.notes)
    assert seen.details["stream_hazard"]["hazard"]


def test_debug_tensors_that_the_engine_did_not_hand_out_are_named(tmp_path: Path) -> None:
    plan = write_engine(tmp_path)
    written = load_sidecar(plan)
    assert written is not None
    sidecar = dataclasses.replace(written, look="debug")
    sidecar.save(plan)
    names = {str(o.site): o.name for o in sidecar.outputs}
    shown = [name for site, name in names.items() if site != "layers.2.hidden"]
    _, facts = run(TensorRTProbe(plan, runner=StandIn(tmp_path, facts={"debug": shown, "io": []})))
    assert [n for n in facts.notes if "debug tensor" in n] == [
        "The engine did not hand out the debug tensor of layers.2.hidden."
    ]


def test_hazards_become_evidence(tmp_path: Path) -> None:
    hazard = {"trial": "late inputs", "outputs": {"logits": 12}, "claim": "the engine does not wait"}
    made = probe(tmp_path, options=EngineOptions(hazards=True), facts={"hazards": [hazard]})
    _, facts = run(made)
    assert facts.details["stream_hazard"] == {
        "looked": True,
        "hazard": True,
        "evidence": ["host torch: the engine does not wait: logits (12 elements)"],
        "hosts": ["torch"],
    }
    assert any(note.startswith("Stream hazard: host torch") for note in facts.notes)


def test_hosts_that_disagree_are_a_hazard(tmp_path: Path) -> None:
    class Disagreeing(StandIn):
        def call(self, job: str, request: Any, **how: Any) -> dict[str, Any]:
            self.noise = 1e-3 if request.get("host") == "pycuda" else 0.0
            return super().call(job, request, **how)

    plan = write_engine(tmp_path)
    made = TensorRTProbe(plan, options=EngineOptions(host="both"), runner=Disagreeing(tmp_path))
    _, facts = run(made)
    assert facts.details["stream_hazard"]["hazard"]
    assert any("hosts torch and pycuda differ" in line for line in facts.details["stream_hazard"]["evidence"])
    _, agreed = run(TensorRTProbe(plan, options=EngineOptions(host="both"), runner=StandIn(tmp_path)))
    assert not agreed.details["stream_hazard"]["hazard"]
    assert "Hosts torch and pycuda agree to the bit, and no stream hazard was found." in agreed.notes


@pytest.mark.parametrize(("noise", "changed"), [(0.0, False), (1e-4, True)])
def test_the_observer_check_compares_final_outputs(tmp_path: Path, noise: float, changed: bool) -> None:
    _, facts = run(probe(tmp_path, plain=True, plain_noise=noise))
    observer = facts.details["observer"]
    assert observer["changed"] is changed
    assert set(observer["outputs"]) == {"keys", "values", "logits"}
    assert any(note.startswith("Looking changed") for note in facts.notes)


def test_outputs_of_other_names_are_found_by_shape_and_value(tmp_path: Path) -> None:
    class Numbered(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = demo.load()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(self.inner(input_ids, attention_mask).values())

    result = compare(Numbered(), probe(tmp_path, noise=1e-7), INPUTS, config=Config())
    assert not [u for u in result.unmatched if u.state == "missing in candidate"]
    found = {s.site: s.found_cand for s in result.sites if s.site.startswith("output.")}
    assert "by its value" in found["output.0"]
    assert found["output.0"].startswith("output keys")
    assert found["output.2"].startswith("output logits")


def test_the_report_is_the_same_twice(tmp_path: Path) -> None:
    made = probe(tmp_path)
    first, second = (compare(demo.load(), made, INPUTS, config=Config()) for _ in range(2))
    assert dataclasses.replace(first, environment={}) == dataclasses.replace(second, environment={})


def test_a_plan_that_changed_since_it_was_built_is_refused(tmp_path: Path) -> None:
    plan = write_engine(tmp_path)
    content = bytearray(plan.read_bytes())
    content[len(content) // 2] ^= 0xFF
    plan.write_bytes(bytes(content))
    with pytest.raises(
        SourceError, match=re.escape(f"{plan}: is not the plan that engine.plan.json describes")
    ):
        run(TensorRTProbe(plan, runner=StandIn(tmp_path)))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a TensorRT plan"),
        (b"ftr", "not a TensorRT plan"),
        (b"an engine, says its name, and is a text\n" * 9, "not a TensorRT plan"),
        (None, "no such file; build it"),
    ],
)
def test_files_that_are_no_plans(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "engine.plan"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError, match=said) as caught:
        TensorRTProbe(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_plan(tmp_path: Path) -> None:
    (tmp_path / "engine.plan").mkdir()
    with pytest.raises(SourceError, match="is a folder"):
        TensorRTProbe(tmp_path / "engine.plan")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 99}', '{"schema": 1}'])
def test_sidecars_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    plan = write_engine(tmp_path)
    beside(plan).write_text(text)
    with pytest.raises(SourceError, match="engine.plan.json: .*build the engine again"):
        TensorRTProbe(plan)


def test_a_sidecar_reads_back_as_it_was_written(tmp_path: Path) -> None:
    plan = write_engine(tmp_path, plain=True)
    sidecar = load_sidecar(plan)
    assert sidecar is not None
    text = beside(plan).read_text()
    sidecar.save(plan)
    assert json.loads(beside(plan).read_text()) == json.loads(text)


def test_a_site_may_be_named_by_the_configuration(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "bare.plan")
    demo.write_bundled("clean", tmp_path / "m.onnx")
    stand_in = StandIn(tmp_path)
    value = stand_in.found[0].value
    seen, _ = run(TensorRTProbe(plan, runner=stand_in, sites={"layers.0.key": value}))
    assert "layers.0.key" in seen
    assert f"output.{value}" not in seen
    with pytest.raises(ConfigurationError, match="no such tensor"):
        run(TensorRTProbe(plan, runner=stand_in, sites={"layers.0.key": value + "x"}))


def test_a_dead_worker_is_left_behind(tmp_path: Path) -> None:
    plan = write_engine(tmp_path)
    made = TensorRTProbe(plan, options=EngineOptions(host="pycuda"))
    with pytest.raises(SourceError, match="CUDA device"):
        run(made)
    assert made._worker is None


class Ahead(StandIn):
    """A worker that is posted to: runs when it is fetched from, and times when it is asked."""

    def __init__(self, folder: Path, refused: DivergenceError | None = None) -> None:
        super().__init__(folder)
        self.refused = refused
        self.posted: list[tuple[str, Mapping[str, Any]]] = []
        self.closed = False
        self.alive = True

    def post(self, job: str, request: Mapping[str, Any], *, about: str) -> None:
        self.posted.append((job, request))

    def fetch(self, *, about: str, progress: Progress = silent) -> dict[str, Any]:
        if self.refused is not None:
            raise self.refused
        job, request = self.posted[-1]
        return {**super().call(job, request, about=about, progress=progress), "latency_ms": None}

    def call(
        self, job: str, request: Mapping[str, Any], *, about: str, progress: Progress = silent
    ) -> dict[str, Any]:
        if job.endswith(":latency"):
            return {"latency_ms": 2.5}
        return super().call(job, request, about=about, progress=progress)

    def close(self) -> None:
        self.closed = True


def begun(folder: Path, monkeypatch: pytest.MonkeyPatch, ahead: Ahead, **how: Any) -> TensorRTProbe:
    monkeypatch.setattr("divergence.probes.tensorrt.probe.Worker", lambda *_, **__: ahead)
    made = TensorRTProbe(folder / "engine.plan", **how)
    made.start()
    made.begin(INPUTS)
    return made


def test_a_run_that_was_begun_is_the_one_that_is_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = run(probe(tmp_path))
    ahead = Ahead(tmp_path)
    seen, facts = run(begun(tmp_path, monkeypatch, ahead))
    assert [job.rpartition(":")[2] for job, _ in ahead.posted] == ["load", "run"]
    assert ahead.posted[-1][1]["timed"] is False
    assert facts.details["latency_ms"] == 2.5, "taken when nothing else runs"
    assert seen.keys() == plain.keys()
    assert all(torch.equal(seen[site], plain[site]) for site in plain)
    assert ahead.closed
    assert not Path(ahead.posted[-1][1]["inputs"]).exists(), "its folder is gone"


def test_a_run_on_other_inputs_is_not_the_one_that_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_engine(tmp_path)
    ahead = Ahead(tmp_path)
    made = begun(tmp_path, monkeypatch, ahead)
    other = demo.inputs(tokens=12)
    facts = made.run(other, lambda _: None)
    assert ahead.closed
    assert ahead.requests[-1]["inputs"] != ahead.posted[1][1]["inputs"]
    assert facts.details["latency_ms"] == 1.25


def test_hosts_and_hazards_wait_for_their_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_engine(tmp_path)
    for options in (EngineOptions(hazards=True), EngineOptions(host="both")):
        ahead = Ahead(tmp_path)
        begun(tmp_path, monkeypatch, ahead, options=options)
        assert [job.rpartition(":")[2] for job, _ in ahead.posted] == ["load"]


def test_what_is_wrong_with_a_run_that_was_begun_is_said_when_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_engine(tmp_path)
    ahead = Ahead(tmp_path, refused=InputError("engine.plan: the engine's inputs x are missing"))
    made = begun(tmp_path, monkeypatch, ahead)
    with pytest.raises(InputError, match="inputs x are missing"):
        run(made)
    assert ahead.closed


@pytest.mark.parametrize("alive", [True, False])
def test_a_run_that_failed_beside_the_reference_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: bool
) -> None:
    """In the same process, if that is still there: the device's memory was the reference's then."""
    write_engine(tmp_path)
    ahead = Ahead(tmp_path, refused=SourceError("engine.plan: out of device memory"))
    ahead.alive = alive
    made = begun(tmp_path, monkeypatch, ahead)
    if alive:
        _, facts = run(made)
        assert facts.details["latency_ms"] == 1.25
        assert ahead.requests[-1]["inputs"] == ahead.posted[-1][1]["inputs"]
    else:
        with pytest.raises(SourceError, match="out of device memory"):
            run(made)
    assert ahead.closed


def test_what_cannot_be_begun_is_run_when_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is wrong is said then, when the reference has run and others can still be compared."""

    class Full(Ahead):
        def post(self, job: str, request: Mapping[str, Any], *, about: str) -> None:
            if job.endswith(":run"):
                raise OSError(28, "No space left on device")

    plain, _ = run(probe(tmp_path))
    seen, facts = run(begun(tmp_path, monkeypatch, Full(tmp_path)))
    assert seen.keys() == plain.keys()
    assert facts.details["latency_ms"] == 1.25
