"""Every probe against the contract.

To add a probe, write a function that makes its `ProbeCase` in a temporary folder and decorate it with
`@case("name")`, with marks (`pytest.mark.gpu`) where it needs more than a CPU.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from divergence import demo, probes
from divergence.inputs import digest
from divergence.probes import Observation, Progress, RunFacts, Sink, silent
from divergence.probes.fake import FakeProbe
from divergence.probes.onnx import OnnxProbe
from divergence.probes.pytorch import PyTorchProbe
from divergence.probes.recorded import RecordedProbe
from divergence.probes.tensorrt.probe import TensorRTProbe
from divergence.probes.tensorrt.process import Worker
from divergence.recording import CaptureWriter
from tests.probes import contract
from tests.probes.contract import CHECKS, CaseMaker, ProbeCase
from tests.tensorrt.engines import INPUTS as ENGINE_INPUTS
from tests.tensorrt.engines import engine
from tests.tensorrt.stand_in import StandIn, write_engine

CASES: dict[str, tuple[CaseMaker, tuple[pytest.MarkDecorator, ...]]] = {}


def case(name: str, *marks: pytest.MarkDecorator) -> Callable[[CaseMaker], CaseMaker]:
    """Registers the maker of a case under `name`."""

    def register(maker: CaseMaker) -> CaseMaker:
        CASES[name] = (maker, marks)
        return maker

    return register


INPUTS = {"ids": torch.tensor([[3, 1, 4, 1]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}


def _tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {"output.logits": torch.randn(1, 4, 9, generator=generator)}
    for layer in range(3):
        tensors[f"layers.{layer}.hidden"] = torch.randn(1, 4, 8, generator=generator).half()
        tensors[f"layers.{layer}.mlp"] = torch.randn(1, 4, 8, generator=generator).half()
        tensors[f"layers.{layer}.key"] = torch.randn(1, 2, 4, 4, generator=generator).bfloat16()
    return tensors


def _fake(seed: int = 0) -> FakeProbe:
    return FakeProbe(_tensors(seed), inputs=tuple(INPUTS))


@case("fake")
def make_fake(folder: Path) -> ProbeCase:
    """The fake probe."""
    del folder
    return ProbeCase(
        probe=_fake(),
        same=_fake,
        changed=lambda: _fake(seed=1),
        inputs=INPUTS,
        wrong_inputs={
            "a name is missing": {"ids": INPUTS["ids"]},
            "a name too many": {**INPUTS, "extra": torch.zeros(1)},
            "nothing": {},
        },
    )


@case("recorded")
def make_recorded(folder: Path) -> ProbeCase:
    """The recorded probe, on a capture of the fake one."""

    def record(name: str, seed: int) -> Path:
        with CaptureWriter(folder / name) as writer:
            facts = _fake(seed).run(INPUTS, writer, detail=True)
            writer.close(facts, digest(INPUTS))
        return folder / name

    path, changed = record("run.capture", 0), record("changed.capture", 1)
    return ProbeCase(
        probe=RecordedProbe(path),
        same=lambda: RecordedProbe(path),
        changed=lambda: RecordedProbe(changed),
        inputs=INPUTS,
        wrong_inputs={"another value": {**INPUTS, "ids": INPUTS["ids"] + 1}},
    )


def _pytorch(gain: float | None = None) -> PyTorchProbe:
    """The bundled decoder, with one value projection changed if `gain` is given."""
    model = demo.load()
    if gain is not None:
        model.state_dict()["layers.1.self_attn.v_proj.weight"].mul_(gain)
    return PyTorchProbe(model)


DEMO_INPUTS = demo.inputs(batch=2, tokens=11)
DEMO_WRONG_INPUTS = {
    "a name is missing": {"attention_mask": DEMO_INPUTS["attention_mask"]},
    "nothing": {},
}


@case("pytorch")
def make_pytorch(folder: Path) -> ProbeCase:
    """The PyTorch probe on the bundled decoder."""
    del folder
    return ProbeCase(
        probe=_pytorch(),
        same=_pytorch,
        changed=lambda: _pytorch(gain=1.02),
        inputs=DEMO_INPUTS,
        wrong_inputs={**DEMO_WRONG_INPUTS, "a name too many": {**DEMO_INPUTS, "extra": torch.zeros(1)}},
        describe_needs_inputs=True,
    )


@case("onnx")
def make_onnx(folder: Path) -> ProbeCase:
    """The ONNX probe on an export of the bundled decoder."""
    path, changed = folder / "clean.onnx", folder / "changed.onnx"
    demo.write_bundled("clean", path)
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    scaled = numpy_helper.to_array(weight) * np.float32(1.02)
    weight.CopyFrom(numpy_helper.from_array(scaled, weight.name))
    onnx.save(model, changed)
    ids = DEMO_INPUTS["input_ids"]
    return ProbeCase(
        probe=OnnxProbe(path),
        same=lambda: OnnxProbe(path),
        changed=lambda: OnnxProbe(changed),
        inputs=DEMO_INPUTS,
        wrong_inputs={
            **DEMO_WRONG_INPUTS,
            "another dtype": {**DEMO_INPUTS, "input_ids": ids.float()},
            "an axis too many": {**DEMO_INPUTS, "input_ids": ids[None]},
            "lengths that disagree": {**DEMO_INPUTS, "input_ids": ids[:, 1:]},
        },
    )


@case("tensorrt")
def make_tensorrt(folder: Path) -> ProbeCase:
    """The probe of engines, with a stand-in for the process that runs them."""
    plan, changed = write_engine(folder), write_engine(folder, content=b"changed", name="changed")
    runner = StandIn(folder)
    return ProbeCase(
        probe=TensorRTProbe(plan, runner=runner),
        same=lambda: TensorRTProbe(plan, runner=runner),
        changed=lambda: TensorRTProbe(changed, runner=runner),
        inputs=DEMO_INPUTS,
        wrong_inputs=DEMO_WRONG_INPUTS,
        has_detail=False,
    )


@case("tensorrt on a device", pytest.mark.tensorrt, pytest.mark.slow)
def make_tensorrt_on_a_device(folder: Path) -> ProbeCase:
    """The probe of engines as they run, in one worker."""
    plan, changed = engine("fp32", plain=False), engine("fp32", fault="rotary-bf16", plain=False)
    del folder
    runner = Worker()
    return ProbeCase(
        probe=TensorRTProbe(plan, runner=runner),
        same=lambda: TensorRTProbe(plan, runner=runner),
        changed=lambda: TensorRTProbe(changed, runner=runner),
        inputs=ENGINE_INPUTS,
        wrong_inputs={
            "a name is missing": {"attention_mask": ENGINE_INPUTS["attention_mask"]},
            "nothing": {},
            "another length": {name: t[:, :7] for name, t in ENGINE_INPUTS.items()},
        },
        has_detail=False,
    )


def test_every_probe_has_a_case() -> None:
    """Under the name of its module or package in `probes/`."""

    def holds_a_probe(name: str) -> bool:
        module = importlib.import_module(f"{probes.__name__}.{name}")
        return any(
            inspect.isclass(member)
            and member.__module__.startswith(module.__name__)
            and {"describe", "run"} <= vars(member).keys()
            for member in (
                *vars(module).values(),
                *(getattr(module, n) for n in vars(module).get("__all__", ())),
            )
        )

    found = {info.name for info in pkgutil.iter_modules(probes.__path__) if holds_a_probe(info.name)}
    assert {"fake", "recorded", "pytorch", "onnx", "tensorrt"} <= found
    assert found <= CASES.keys()


@pytest.fixture(scope="module")
def probe_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ProbeCase:
    """The case of one probe, made once for all checks."""
    maker: CaseMaker = request.param
    return maker(tmp_path_factory.mktemp("probe"))


@pytest.mark.parametrize(
    "probe_case",
    [pytest.param(maker, id=name, marks=marks) for name, (maker, marks) in CASES.items()],
    indirect=True,
)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_probe_keeps_the_contract(probe_case: ProbeCase, check: Callable[[ProbeCase], None]) -> None:
    check(probe_case)


def test_recorded_run_without_inputs_checks_nothing(tmp_path: Path) -> None:
    probe = make_recorded(tmp_path).probe
    seen: list[str] = []
    probe.run({}, lambda observation: seen.append(str(observation.site)))
    assert seen[0] == "layers.0.key"


def test_recorded_run_on_other_inputs_names_both_digests(tmp_path: Path) -> None:
    probe = make_recorded(tmp_path).probe
    other = {"ids": torch.zeros(1, 1)}
    with pytest.raises(Exception, match=f"{digest(INPUTS)}.*{digest(other)}"):
        probe.run(other, lambda _: None)


def test_recorded_facts_are_those_of_the_run(tmp_path: Path) -> None:
    facts = make_recorded(tmp_path).probe.run(INPUTS, lambda _: None)
    assert (facts.kind, facts.source, facts.precision) == ("fake", "fake", "bf16")
    assert facts.model_digest == _fake().run(INPUTS, lambda _: None).model_digest


class _Broken(FakeProbe):
    """A fake probe that hands over `broken` of what it should."""

    def run(
        self,
        inputs: Mapping[str, torch.Tensor],
        sink: Sink,
        *,
        detail: bool = False,
        progress: Progress = silent,
    ) -> RunFacts:
        self.start(inputs, progress)

        def pass_on(seen: Observation) -> None:
            if (broken := self.broken(seen)) is not None:
                sink(broken)

        return super().run(inputs, pass_on, detail=detail, progress=progress)

    def start(self, inputs: Mapping[str, torch.Tensor], progress: Progress) -> None:
        """What goes wrong before a run."""

    def broken(self, seen: Observation) -> Observation | None:
        return seen


class _Shares(_Broken):
    """Hands over its own storage."""

    def broken(self, seen: Observation) -> Observation:
        return replace(seen, tensor=self._tensors[seen.site])


class _Drifts(_Broken):
    """Gives other numbers in every run."""

    runs = 0

    def start(self, inputs: Mapping[str, torch.Tensor], progress: Progress) -> None:
        self.runs += 1

    def broken(self, seen: Observation) -> Observation:
        return replace(seen, tensor=seen.tensor + self.runs)


class _Scribbles(_Broken):
    """Modifies its inputs."""

    def start(self, inputs: Mapping[str, torch.Tensor], progress: Progress) -> None:
        inputs["ids"].add_(1)


class _Misnames(_Broken):
    """Names an axis too few, skips a site it describes, and counts progress past its total."""

    def start(self, inputs: Mapping[str, torch.Tensor], progress: Progress) -> None:
        progress("running", 3, 2)

    def broken(self, seen: Observation) -> Observation | None:
        return None if seen.site.layer == 2 else replace(seen, axes=seen.axes[1:])


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (_Shares, contract.leaves_nothing_aliased),
        (_Drifts, contract.is_deterministic),
        (_Drifts, contract.adds_detail),
        (_Scribbles, contract.keeps_inputs),
        (_Misnames, contract.names_axes),
        (_Misnames, contract.describes_what_it_yields),
        (_Misnames, contract.reports_progress),
    ],
    ids=lambda value: value.__name__,
)
def test_contract_catches_a_broken_probe(
    broken: type[FakeProbe], check: Callable[[ProbeCase], None], tmp_path: Path
) -> None:
    """The checks are able to fail: each is shown a probe that breaks just what it is about."""
    probe = broken(_tensors(), inputs=tuple(INPUTS))
    inputs = {name: tensor.clone() for name, tensor in INPUTS.items()}
    with pytest.raises(AssertionError):
        check(replace(make_fake(tmp_path), probe=probe, same=lambda: probe, inputs=inputs))


def test_contract_catches_a_digest_that_ignores_weights_and_inputs_that_are_not_checked(
    tmp_path: Path,
) -> None:
    careless = replace(make_fake(tmp_path), probe=FakeProbe(_tensors()), changed=_fake)
    with pytest.raises(AssertionError):
        contract.digests_weights(careless)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        contract.refuses_wrong_inputs(careless)
