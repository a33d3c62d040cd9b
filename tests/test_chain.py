"""Chains: faults planted in a known step, and candidates that cannot be compared."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import divergence
from divergence.chain_result import Chain
from divergence.config import Config, Tolerance
from divergence.demo import inputs, load, planted, write_bundled
from divergence.errors import ConfigurationError, SourceError
from divergence.probes import Progress, RunFacts, Sink, silent
from divergence.probes.fake import FakeProbe
from divergence.probes.pytorch import PyTorchProbe
from divergence.result import Comparison
from tests.models import inputs_for, llama

Export = Callable[[str], Path]


class Wrapper(nn.Module):
    """An export wrapper: the same model under another name, with its outputs chosen."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.inner(input_ids, attention_mask)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Writes a bundled export once."""
    folder = tmp_path_factory.mktemp("exports")

    def written(name: str) -> Path:
        path = folder / f"{name}.onnx"
        if not path.exists():
            write_bundled(name, path)
        return path

    return written


def chained(ref: object, cands: Sequence[object], given: Any = None, **options: Any) -> Chain:
    """Compares without any configuration file."""
    return divergence.compare_chain(
        ref, cands, inputs(tokens=48) if given is None else given, config=Config(), **options
    )


def faulty(projection: str, gain: float = 1.02) -> nn.Module:
    """The bundled model with one projection too large."""
    model = load()
    with torch.no_grad():
        weight(model, projection).mul_(gain)
    return model


def weight(model: nn.Module, projection: str) -> Tensor:
    """The weight of a projection, called by its path below `layers`."""
    return model.get_parameter(f"layers.{projection}.weight")


def verdicts(chain: Chain) -> list[tuple[str, str | None]]:
    return [(step.verdict, step.site) for step in chain.steps]


def test_a_clean_chain_passes(export: Export) -> None:
    chain = chained(load(), [Wrapper(load()), export("clean")])
    assert (chain.verdict, chain.reason) == ("pass", "all 2 candidates are within their limits")
    assert chain.names == ("Wrapper", "clean.onnx")
    wrapper, onnx = chain.steps
    assert (wrapper.from_, wrapper.to, wrapper.sentence) == ("pytorch", "Wrapper", "equal to the bit")
    assert wrapper.bit_equal and wrapper.rel_l2 == 0 and wrapper.rel_l2_at is None
    assert (onnx.from_, onnx.to, onnx.verdict, onnx.site) == ("Wrapper", "clean.onnx", "pass", None)
    assert not onnx.bit_equal and 0 < (onnx.rel_l2 or 0) < 1e-6
    assert chain.culprit is None


def test_a_fault_of_the_export_is_blamed_on_the_export(export: Export) -> None:
    chain = chained(load(), [Wrapper(load()), export("rotary-bf16")])
    assert verdicts(chain) == [("pass", None), ("fail", "layers.0.key")]
    assert chain.reason == "rotary-bf16.onnx fails, by step: Wrapper: none; rotary-bf16.onnx: layers.0.key"
    assert chain.culprit is chain.steps[1]
    assert "Wrapper is equal to the bit there" in chain.steps[1].sentence


def test_a_fault_in_the_middle_is_not_blamed_on_what_follows(export: Export) -> None:
    """PyTorch, its clean export, an export with the fault, and a wrapper with the same fault."""
    model = load()
    with planted(model, rotary_dtype=torch.bfloat16):
        chain = chained(load(), [export("clean"), export("rotary-bf16"), Wrapper(model)])
    assert [c.verdict for c in chain.comparisons] == ["pass", "fail", "fail"]
    assert verdicts(chain) == [("pass", None), ("fail", "layers.0.key"), ("pass", None)]
    assert chain.steps[2].sentence.endswith("what fails at layers.0.key was there before")


def test_a_fault_of_the_wrapper_is_not_blamed_on_its_export(export: Export) -> None:
    model = load()
    with planted(model, rotary_dtype=torch.bfloat16):
        chain = chained(load(), [Wrapper(model), export("rotary-bf16")])
    assert verdicts(chain) == [("fail", "layers.0.key"), ("pass", None)]
    assert chain.reason.endswith("by step: Wrapper: layers.0.key; rotary-bf16.onnx: none")
    # One fault in two runtimes: both are far from the reference, and close to each other.
    key = next(d for d in chain.steps[1].differences if d.site == "layers.0.key")
    assert (chain["rotary-bf16.onnx"].site("layers.0.key").rel_l2 or 0) > 5e-3
    assert (key.rel_l2 or 0) < 1e-6 and (key.ratio or 0) < 4


def test_each_step_is_blamed_for_its_own_fault() -> None:
    both = faulty("1.self_attn.v_proj")
    with torch.no_grad():
        weight(both, "4.self_attn.k_proj").mul_(1.05)
    chain = chained(load(), [faulty("1.self_attn.v_proj"), both], names=["first", "second"])
    assert verdicts(chain) == [("fail", "layers.1.value"), ("fail", "layers.4.key")]


def test_an_error_that_grows_is_blamed_on_the_step_that_makes_it_grow() -> None:
    small, large = faulty("2.self_attn.k_proj", 1.01), faulty("2.self_attn.k_proj", 1.2)
    assert verdicts(chained(load(), [small, large])) == [("fail", "layers.2.key"), ("fail", "layers.2.key")]
    shrinking = chained(load(), [large, small])
    assert verdicts(shrinking) == [("fail", "layers.2.key"), ("pass", None)]
    little = faulty("2.self_attn.k_proj", 1.012)
    assert verdicts(chained(load(), [small, little])) == [("fail", "layers.2.key"), ("pass", None)]


def test_a_mended_error_is_said_to_be_gone() -> None:
    chain = chained(load(), [faulty("3.self_attn.v_proj"), load()], names=["broken", "mended"])
    assert [c.verdict for c in chain.comparisons] == ["fail", "pass"]
    assert verdicts(chain) == [("fail", "layers.3.value"), ("pass", None)]
    assert chain.steps[1].sentence.endswith("the error of broken at layers.3.value is gone")


def test_precisions_are_read_from_each_candidate_and_rounding_is_no_error() -> None:
    half = load(dtype=torch.float16)
    chain = chained(load(), [Wrapper(load()), half, load(dtype=torch.bfloat16)])
    assert chain.verdict == "pass", chain.reason
    assert [c.policy.precision for c in chain.comparisons] == ["fp32", "fp16", "bf16"]
    assert [c.policy.precision for c in chained(load(), [load(), half], precision="bf16").comparisons] == [
        "bf16",
        "bf16",
    ]


def test_an_inherited_error_is_not_blamed_on_the_step_with_the_lower_floor() -> None:
    """A bf16 wrapper may be off by what bf16 costs; what is built from its weights in fp32 may not, but
    did not bring it in."""
    rounded = load(dtype=torch.bfloat16).float()
    chain = chained(load(), [load(dtype=torch.bfloat16), rounded], names=["bf16", "fp32"])
    assert [c.verdict for c in chain.comparisons] == ["pass", "fail"]
    assert verdicts(chain) == [("pass", None), ("pass", None)]
    assert "fails by the lower noise floor of fp32" in chain.steps[1].sentence


def test_the_same_candidate_twice_is_equal_to_the_bit(export: Export) -> None:
    chain = chained(load(), [export("rotary-bf16"), export("rotary-bf16")])
    assert chain.names == ("rotary-bf16.onnx", "rotary-bf16.onnx#2")
    assert chain.steps[1].bit_equal and chain.steps[1].verdict == "pass"
    assert chain.steps[1].sentence == "equal to the bit; what fails at layers.0.key was there before"
    one, two = (c.sites for c in chain.comparisons)
    assert one == two


def test_a_chain_judges_every_candidate_as_it_is_judged_alone(export: Export) -> None:
    cands = [export("clean"), faulty("2.self_attn.v_proj"), load(dtype=torch.float16)]
    chain = chained(load(), cands)
    for cand, found in zip(cands, chain.comparisons, strict=True):
        alone = divergence.compare(load(), cand, inputs(tokens=48), config=Config())
        assert (found.verdict, found.reason, found.sites) == (alone.verdict, alone.reason, alone.sites)
        assert (found.policy, found.unmatched) == (alone.policy, alone.unmatched)


class Counting(PyTorchProbe):
    """Counts its runs; the noise floor and replay do not go through `run`."""

    runs = 0

    def run(
        self,
        inputs: Any,
        sink: Sink,
        *,
        detail: bool = False,
        progress: Progress = silent,
        record: bool = False,
    ) -> RunFacts:
        self.runs += 1
        return super().run(inputs, sink, detail=detail, progress=progress, record=record)


def test_every_source_runs_once(tmp_path: Path) -> None:
    reference = Counting(load())
    cands = [Counting(load(dtype=torch.float16)) for _ in range(3)]
    chained(reference, cands, keep=tmp_path)
    assert [probe.runs for probe in (reference, *cands)] == [1, 1, 1, 1]
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"reference.capture", *(f"candidate-{i}.capture" for i in (1, 2, 3))}


def test_the_noise_floor_is_taken_once_for_each_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    from divergence.noise import measure

    def counted(probe: Any, given: Any, reference: Any, precision: str, *args: Any, **options: Any) -> Any:
        taken.append(precision)
        return measure(probe, given, reference, precision, *args, **options)

    monkeypatch.setattr("divergence.prepared.measure", counted)
    half, rough = load(dtype=torch.float16), load(dtype=torch.bfloat16)
    chained(load(), [half, half, rough, half])
    assert taken == ["fp16", "bf16"]


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_candidate_that_cannot_run_loses_none_of_the_others(export: Export, position: int) -> None:
    cands: list[object] = [Wrapper(load()), export("clean")]
    cands.insert(position, Path("absent.onnx"))
    chain = chained(load(), cands)
    assert chain.verdict == "error"
    assert chain.reason.startswith("absent.onnx could not be compared: absent.onnx: no such ONNX file")
    expected = ["pass", "pass"]
    expected.insert(position, "error")
    assert [c.verdict for c in chain.comparisons] == expected
    assert [s.verdict for s in chain.steps] == expected
    assert "no such ONNX file" in chain["absent.onnx"].reason and not chain["absent.onnx"].sites
    assert chain["clean.onnx"].sites
    # What follows is held against the last one that ran.
    assert chain.steps[2].from_ == ("clean.onnx" if position == 2 else "Wrapper")
    if position == 1:
        assert chain.steps[2].sentence.endswith("between the two, absent.onnx could not be compared")


def test_a_candidate_that_raises_is_an_error_and_the_fault_of_another_is_still_found(
    export: Export,
) -> None:
    class Raises(Wrapper):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            raise ValueError("no such kernel")

    chain = chained(load(), [Raises(load()), export("rotary-bf16")])
    assert chain.verdict == "error" and "no such kernel" in chain.reason
    assert chain.steps[1].site == "layers.0.key" and chain.steps[1].verdict == "fail"


def test_no_candidate_that_runs_is_an_error() -> None:
    chain = chained(load(), ["one.onnx", "two.onnx"])
    assert chain.verdict == "error" and [s.verdict for s in chain.steps] == ["error", "error"]


def test_a_reference_that_cannot_run_is_raised() -> None:
    with pytest.raises(SourceError, match="absent"):
        chained("absent.onnx", [load()])


def test_nan_is_blamed_on_the_step_that_made_it() -> None:
    broken = load()
    with torch.no_grad():
        weight(broken, "2.self_attn.k_proj")[3, 3] = float("nan")
    chain = chained(load(), [load(), broken, copy.deepcopy(broken)], names=["one", "two", "three"])
    assert [c.verdict for c in chain.comparisons] == ["pass", "fail", "fail"]
    assert verdicts(chain) == [("pass", None), ("fail", "layers.2.key"), ("pass", None)]
    assert "NaN or Inf" in chain.steps[1].sentence
    assert chain.steps[2].bit_equal  # NaN of the same bits is the same


def test_sites_that_a_step_loses_are_blamed_on_it() -> None:
    model = llama(4)
    cut = copy.deepcopy(model)
    cut.model.layers = cut.model.layers[:3]
    chain = chained(
        model,
        [model, cut, cut],
        inputs_for("llama", tokens=17),
        names=["whole", "cut", "again"],
        exclude=["output.*"],
    )
    assert [c.verdict for c in chain.comparisons] == ["pass", "fail", "fail"]
    assert verdicts(chain) == [("pass", None), ("fail", "layers.3.key"), ("pass", None)]
    assert chain.steps[1].sentence == (
        "lacks layers.3.key and 2 more (missing in candidate), which whole has"
    )


def test_a_site_that_the_one_before_lacks_is_not_held_against_it() -> None:
    sites = {"layers.0.key": torch.ones(1, 1, 4, 8), "layers.0.value": torch.ones(1, 1, 4, 8)}
    reference = {**sites, "layers.0.hidden": torch.arange(32.0).reshape(1, 4, 8)}
    wrong = {**reference, "layers.0.hidden": reference["layers.0.hidden"] * 1.5}
    limits = Tolerance(policy="absolute", sites={"*": {"rel_l2": 0.1}})
    chain = divergence.compare_chain(
        FakeProbe(reference, source="ref"),
        [FakeProbe(sites, source="a"), FakeProbe(wrong, source="b")],
        {"x": torch.ones(1)},
        names=["keys only", "all"],
        tolerance=limits,
        config=Config(),
    )
    assert chain.steps[0].sentence == "lacks layers.0.hidden (missing in candidate), which ref has"
    assert chain.steps[1].site == "layers.0.hidden"
    assert "keys only does not have this site" in chain.steps[1].sentence


def test_what_cannot_be_judged_is_an_error_of_the_step() -> None:
    """A floor that was given and lacks a site leaves nothing to judge that site by."""
    value = {"layers.0.value": torch.ones(1, 1, 4, 8)}
    reference = {"layers.0.key": torch.ones(1, 1, 4, 8), **value}
    other = {"layers.0.key": torch.full((1, 1, 4, 8), 1.0001), **value}
    chain = divergence.compare_chain(
        FakeProbe(reference),
        [FakeProbe(reference), FakeProbe(other), FakeProbe(other)],
        {"x": torch.ones(1)},
        names=["same", "other", "again"],
        floor=FakeProbe(value),
        config=Config(),
    )
    assert [c.verdict for c in chain.comparisons] == ["pass", "error", "error"]
    assert [(s.verdict, s.bit_equal) for s in chain.steps] == [
        ("pass", True),
        ("error", False),
        ("pass", True),
    ]
    assert chain.steps[1].sentence.startswith("cannot be told at layers.0.key: no noise floor")
    assert chain.verdict == "error"


def test_labels_are_short_and_different(tmp_path: Path) -> None:
    from divergence.chain import labels_of

    cands = ["pytorch:model.py:wrapper", "a/model.onnx", Path("b/model.onnx"), "engine", nn.Linear(1, 1)]
    assert labels_of(cands, (), "compare_chain") == (
        "wrapper",
        "model.onnx",
        "model.onnx#2",
        "engine",
        "Linear",
    )


@pytest.mark.parametrize(
    ("cands", "names", "message"),
    [
        ([], (), "at least one candidate"),
        ("model.onnx", (), "takes a list of candidates"),
        ([1, 2], ("a",), "1 names for 2 candidates"),
        ([1, 2], ("a", "a"), "none twice"),
    ],
)
def test_a_chain_that_is_none_is_refused(cands: Any, names: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        chained(load(), cands, names=names)


def test_the_report_reads_back(export: Export) -> None:
    chain = chained(load(), [load(), export("rotary-bf16"), "absent.onnx"], command="divergence compare")
    text = chain.to_json()
    again = Chain.from_json(text)
    assert again.to_json() == text
    assert (again.steps, again.names, again.reason) == (chain.steps, chain.names, chain.reason)
    content = json.loads(text)
    assert list(content)[:4] == ["schema", "kind", "verdict", "reason"]
    assert (content["schema"], content["kind"], content["verdict"]) == (1, "chain", "error")
    assert content["names"] == ["DemoDecoder", "rotary-bf16.onnx", "absent.onnx"]
    step = content["steps"][1]
    assert (step["to"], step["verdict"], step["site"]) == ("rotary-bf16.onnx", "fail", "layers.0.key")
    assert step["from"] == "DemoDecoder"
    assert [c["verdict"] for c in content["comparisons"]] == ["pass", "fail", "error"]
    assert content["comparisons"][1]["sites"][0]["site"] == "layers.0.key"


@pytest.mark.parametrize("text", ["", "[]", "null", '{"schema": 1, "kind": "chain"}', '{"kind": "chain"}'])
def test_what_is_no_report_of_a_chain_is_refused(text: str) -> None:
    with pytest.raises(SourceError, match="not a report of divergence"):
        Chain.from_json(text)


def test_the_two_kinds_of_report_are_not_taken_for_each_other() -> None:
    chain = chained(load(), [load()])
    with pytest.raises(SourceError, match="read it with divergence.Chain.from_json"):
        Comparison.from_json(chain.to_json())
    with pytest.raises(SourceError, match="read it with divergence.Comparison.from_json"):
        Chain.from_json(chain.comparisons[0].to_json())
    with pytest.raises(SourceError, match="report schema 9"):
        Chain.from_json(chain.to_json().replace('"schema": 1', '"schema": 9', 1))
