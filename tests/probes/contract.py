"""The contract of `divergence.probes.Probe`, as checks that every probe has to pass.

To have a probe checked, register a case in `tests/probes/test_contract.py`; each function of `CHECKS`
is then run on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from divergence.errors import InputError
from divergence.probes import Description, Observation, Probe, RunFacts
from divergence.sites import DETAIL_TENSORS, Site


@dataclass(frozen=True)
class ProbeCase:
    """A probe of one source, and what the checks need to know of it.

    Attributes:
        probe: the probe.
        same: makes another probe of the same source.
        changed: makes a probe of the same model with one weight changed.
        inputs: inputs that fit.
        wrong_inputs: inputs that do not, by what is wrong with them.
        describe_needs_inputs: whether the source must be run to be described.
        has_detail: whether the source has sites of `DETAIL_TENSORS`.
    """

    probe: Probe
    same: Callable[[], Probe]
    changed: Callable[[], Probe]
    inputs: Mapping[str, torch.Tensor]
    wrong_inputs: Mapping[str, Mapping[str, torch.Tensor]]
    describe_needs_inputs: bool = False
    has_detail: bool = True


CaseMaker = Callable[[Path], ProbeCase]


@dataclass
class Run:
    """What a run gave: its facts, its observations as they came, and the tensors kept by copy."""

    facts: RunFacts
    observations: list[Observation] = field(default_factory=list)
    kept: dict[Site, torch.Tensor] = field(default_factory=dict)


def _run(probe: Probe, inputs: Mapping[str, torch.Tensor], *, detail: bool = False) -> Run:
    observations: list[Observation] = []
    kept: dict[Site, torch.Tensor] = {}

    def sink(observation: Observation) -> None:
        observations.append(observation)
        kept[observation.site] = observation.tensor.detach().cpu().clone()

    return Run(probe.run(inputs, sink, detail=detail), observations, kept)


def _describe(case: ProbeCase) -> Description:
    return case.probe.describe(case.inputs if case.describe_needs_inputs else None)


def _assert_same_tensors(first: Mapping[Site, torch.Tensor], second: Mapping[Site, torch.Tensor]) -> None:
    assert list(map(str, first)) == list(map(str, second))
    for site, tensor in first.items():
        assert torch.equal(_bits(tensor), _bits(second[site])), f"{site} differs"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def is_a_probe(case: ProbeCase) -> None:
    """It has the methods of the protocol, and a kind."""
    assert isinstance(case.probe, Probe)
    assert case.probe.kind


def yields_sites_of_layers(case: ProbeCase) -> None:
    """A run yields layers' sites, each with a tensor, and each says how it was found."""
    run = _run(case.probe, case.inputs)
    assert any(site.layer is not None for site in run.kept)
    for observation in run.observations:
        assert isinstance(observation.tensor, torch.Tensor)
        assert observation.found, f"{observation.site} does not say how it was found"
        assert Site.parse(str(observation.site)) == observation.site


def names_axes(case: ProbeCase) -> None:
    """Axes are unknown, or one name for each dimension, of the names that a site may have."""
    for observation in _run(case.probe, case.inputs, detail=case.has_detail).observations:
        if observation.axes:
            assert len(observation.axes) == observation.tensor.ndim, str(observation.site)
            assert len(set(observation.axes)) == len(observation.axes)
            assert set(observation.axes) <= {"batch", "head", "token", "channel"}


def leaves_nothing_aliased(case: ProbeCase) -> None:
    """What a receiver does to a tensor reaches neither other tensors nor the next run."""
    before = _run(case.probe, case.inputs)
    scribbled: dict[Site, torch.Tensor] = {}

    def scribble(observation: Observation) -> None:
        scribbled[observation.site] = observation.tensor.detach().cpu().clone()

    with torch.no_grad():
        case.probe.run(case.inputs, scribble)
        for observation in before.observations:
            observation.tensor.detach().zero_()
    _assert_same_tensors(before.kept, scribbled)
    _assert_same_tensors(before.kept, _run(case.probe, case.inputs).kept)


def adds_detail(case: ProbeCase) -> None:
    """`detail` adds sites, removes none, and changes no tensor."""
    plain, detailed = _run(case.probe, case.inputs).kept, _run(case.probe, case.inputs, detail=True).kept
    assert not [str(site) for site in plain if site.layer is not None and site.tensor in DETAIL_TENSORS]
    assert plain.keys() <= detailed.keys()
    added = detailed.keys() - plain.keys()
    assert all(site.tensor in DETAIL_TENSORS for site in added)
    assert bool(added) == case.has_detail
    _assert_same_tensors(plain, {site: detailed[site] for site in plain})


def is_deterministic(case: ProbeCase) -> None:
    """Two runs, and two probes of one source, give the same bits, the same order, the same facts."""
    first = _run(case.probe, case.inputs)
    for again in (_run(case.probe, case.inputs), _run(case.same(), case.inputs)):
        _assert_same_tensors(first.kept, again.kept)
        assert _untimed(again.facts) == _untimed(first.facts)


def _untimed(facts: RunFacts) -> RunFacts:
    """`facts` without what a clock said: no run takes as long as another."""

    def kept(details: Any) -> Any:
        if not isinstance(details, Mapping):
            return details
        return {name: kept(value) for name, value in details.items() if name not in ("load_s", "latency_ms")}

    return replace(facts, details=kept(facts.details))


def digests_weights(case: ProbeCase) -> None:
    """The model's digest is the same for the same weights and another for others."""
    digest = _run(case.probe, case.inputs).facts.model_digest
    assert digest
    assert _run(case.same(), case.inputs).facts.model_digest == digest
    changed = case.changed()
    assert _run(changed, case.inputs).facts.model_digest != digest


def states_facts(case: ProbeCase) -> None:
    """The facts name the stacks and outputs of the sites that were yielded."""
    run = _run(case.probe, case.inputs)
    assert run.facts.kind
    assert run.facts.source
    assert {site.stack for site in run.kept if site.layer is not None} <= set(run.facts.stacks)
    assert {site.tensor for site in run.kept if site.layer is None} <= set(run.facts.outputs)
    assert {str(Site.parse(site)) for site in run.facts.unseen_inf} <= {str(site) for site in run.kept}


def keeps_inputs(case: ProbeCase) -> None:
    """Neither the mapping of inputs nor a tensor in it is modified."""
    inputs = {name: tensor.clone() for name, tensor in case.inputs.items()}
    _run(case.probe, inputs, detail=case.has_detail)
    assert list(inputs) == list(case.inputs)
    for name, tensor in case.inputs.items():
        assert torch.equal(_bits(inputs[name]), _bits(tensor)), name


def refuses_wrong_inputs(case: ProbeCase) -> None:
    """Inputs that do not fit are an `InputError` of one line, and the probe still works after it."""
    assert case.wrong_inputs
    for what, inputs in case.wrong_inputs.items():
        with pytest.raises(InputError) as raised:
            _run(case.probe, inputs)
        message = str(raised.value)
        assert message, what
        assert "\n" not in message, what
    assert _run(case.probe, case.inputs).kept


def describes_what_it_yields(case: ProbeCase) -> None:
    """`describe` lists the default sites of a run, and beyond them only sites of a detailed one."""
    description = _describe(case)
    assert description.kind == case.probe.kind
    described = [info.site for info in description.sites]
    assert len(set(described)) == len(described)
    assert all(info.found for info in description.sites)
    plain = set(_run(case.probe, case.inputs).kept)
    detailed = set(_run(case.probe, case.inputs, detail=True).kept)
    assert plain <= set(described) <= detailed
    shapes = {site: tuple(t.shape) for site, t in _run(case.probe, case.inputs, detail=True).kept.items()}
    for info in description.sites:
        known = [dim for dim in zip(info.shape, shapes[info.site], strict=False) if isinstance(dim[0], int)]
        assert all(stated == found for stated, found in known), str(info.site)


def reports_progress(case: ProbeCase) -> None:
    """Progress has a label and counts up to its total, and changes nothing that a run gives."""
    calls: list[tuple[str, int, int]] = []
    kept: dict[Site, torch.Tensor] = {}

    def sink(observation: Observation) -> None:
        kept[observation.site] = observation.tensor.detach().cpu().clone()

    def progress(label: str, done: int, total: int) -> None:
        calls.append((label, done, total))

    case.probe.run(case.inputs, sink, progress=progress)
    reached: dict[str, int] = {}
    for label, done, total in calls:
        assert label
        assert "\n" not in label
        assert reached.get(label, 0) <= done
        assert total == 0 or done <= total
        reached[label] = done
    _assert_same_tensors(_run(case.probe, case.inputs).kept, kept)


def passes_on_what_the_sink_raises(case: ProbeCase) -> None:
    """An exception of the receiver (a full disk) leaves the run as it is, and the next run works."""

    class FullError(Exception):
        pass

    def sink(observation: Observation) -> None:
        raise FullError(str(observation.site))

    with pytest.raises(FullError):
        case.probe.run(case.inputs, sink)
    assert _run(case.probe, case.inputs).kept


CHECKS: tuple[Callable[[ProbeCase], None], ...] = (
    is_a_probe,
    yields_sites_of_layers,
    names_axes,
    leaves_nothing_aliased,
    adds_detail,
    is_deterministic,
    digests_weights,
    states_facts,
    keeps_inputs,
    refuses_wrong_inputs,
    describes_what_it_yields,
    reports_progress,
    passes_on_what_the_sink_raises,
)
