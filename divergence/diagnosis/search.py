"""Looks for the cause of every error that enters, first things first.

The first layer that fails is looked at alone: every cause is put into the reference's layer, on the
candidate's own input to it, until one leaves no more than noise. Then the fault found is put into
the next layer that fails; only what it leaves there is looked for anew.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from divergence.diagnosis import nonfinite, repro
from divergence.diagnosis.case import Case, Given
from divergence.diagnosis.causes import CAUSES, FROM_FACTS, TOLD
from divergence.diagnosis.emulate import LayerUnit, OutsideUnit
from divergence.diagnosis.hypotheses import Tried, attempt
from divergence.diagnosis.reasons import cause_of, hypothesis_of, unknown
from divergence.diagnosis.trying import CONVINCING, convinces, investigate, noting
from divergence.errors import counted
from divergence.probes import Progress, silent
from divergence.probes.pytorch.placement import brought_in
from divergence.result import Cause, Hypothesis, SiteResult
from divergence.sites import Site

if TYPE_CHECKING:
    from divergence.probes.pytorch import PyTorchProbe
    from divergence.replay import Replayer

_LAYERS = 4  # layers that are searched in full; a fault that is everywhere is recognised without
_RUNS = 250  # emulations of whole layers after which no further layer is searched in full,
_SECONDS = 2.0  # unless they took less than this: small models are searched to the end
_OF_KEYS = 0.25  # of a whole layer: what an emulation costs that ends at a key or a value
_ENOUGH_ALIKE = 8  # layers in which a fault is recognised before others are taken for the same
_NEAR = 1.3
_ALIKE = 0.05  # of estimates of one parameter
_PER_LAYER = 3  # independent faults looked for in one layer


@dataclass
class Found:
    """What a search found.

    Attributes:
        causes: best first for every site, sites in execution order.
        hypotheses: everything that was tried.
        notes: what was left out, a sentence each.
    """

    causes: list[Cause] = field(default_factory=list)
    hypotheses: list[Hypothesis] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class _Alike:
    """Tells layers that fail like those in which a fault was recognised: the same tensors, with errors over
    their floors within a factor of `_NEAR`."""

    def __init__(self) -> None:
        self._ratios: list[dict[str, float]] = []
        self.taken = 0

    def add(self, failing: Sequence[SiteResult]) -> None:
        """Adds a layer in which the fault was recognised."""
        self._ratios.append(_ratios(failing))

    def like(self, failing: Sequence[SiteResult]) -> bool:
        """Whether a layer is like all of them; only once there are `_ENOUGH_ALIKE`."""
        if len(self._ratios) < _ENOUGH_ALIKE:
            return False
        mine = _ratios(failing)
        for name, ratio in mine.items():
            known = [r[name] for r in self._ratios if name in r]
            if not known or not min(known) / _NEAR < ratio < max(known) * _NEAR:
                return False
        self.taken += 1
        return True


def _ratios(failing: Sequence[SiteResult]) -> dict[str, float]:
    return {r.tensor: r.introduced_ratio or r.ratio or 0.0 for r in failing}


class Search:
    """Looks for causes in the layers of a reference.

    Args:
        given: what all cases share.
        probe: the reference, after a run with `record=True`.
        replayer: runs its layers.
        introduced: whether results tell the error that a layer introduces; otherwise all but the first
            layer's error may come from before.
    """

    def __init__(self, given: Given, probe: PyTorchProbe, replayer: Replayer, *, introduced: bool) -> None:
        self._given = given
        self._probe = probe
        self._replayer = replayer
        self._introduced = introduced
        self._runs = 0.0
        self._inside: dict[int, contextlib.ExitStack] = {}

    def run(self, progress: Progress = silent) -> Found:
        """Searches the failing layers in execution order."""
        with self._offloading():
            return self._run(progress)

    def _run(self, progress: Progress) -> Found:
        found = Found()
        self._told(found)
        known: list[Tried] = []
        groups = list(self._groups())
        alike = _Alike()
        searched = 0
        started = time.monotonic()
        for done, failing in enumerate(groups):
            progress("looking for the cause", done, len(groups))
            lost = nonfinite.has_lost(failing)
            case = self._nonfinite(failing[0]) if lost else self._case(failing)
            if case is None or (lost and not case.nonfinite) or (done and self._follows(case)):
                continue
            if not lost and alike.like(failing):
                continue
            again = None if lost else _recognised(case, known)
            if again is not None:
                _extend(found, again, case, known)
                alike.add(failing)
                case = _remaining(case, again)
                if case is None:
                    continue
            if searched == _LAYERS or (self._runs > _RUNS and time.monotonic() - started > _SECONDS):
                left = len(groups) - done
                found.notes.append(
                    f"causes were looked for in {counted(searched, 'layer')}; {left} more that fail were not "
                    "searched"
                )
                break
            searched += 1
            results = self._search(case, found, failing[0].site if lost else str(case.at))
            known += results
            if lost or not self._introduced:
                break  # what follows is made of this
        if alike.taken:
            found.notes.append(
                f"{alike.taken} more layers fail with errors of the same size and were not searched one by "
                "one"
            )
        return found

    def write_first(self, folder: Path) -> tuple[str, ...]:
        """Writes the first layer that fails to `folder` (see `repro`); returns remarks.

        Raises:
            SourceError: it cannot be written.
        """
        failing = next(self._groups(), None)
        with self._offloading():
            case = self._case(failing) if failing else None
            if case is None:
                return ("no layer that fails could be replayed, so none was written",)
            return (repro.write(folder, case),)

    def _told(self, found: Found) -> None:
        """Causes that the facts of the run tell."""
        first = next((r.site for r in self._given.results.values() if r.verdict == "fail"), "")
        for module in TOLD:
            told = module.told(self._given)
            if told is not None:
                found.causes.append(Cause(told.id, told.title, told.evidence, None, told.fix, first))
                found.hypotheses.append(Hypothesis(first, told.id, told.title, told.evidence, fix=told.fix))

    def _nonfinite(self, failing: SiteResult) -> Case | None:
        """The case of the first site that is not finite, padding included."""
        site = nonfinite.origin(self._given, failing)
        unit = self._outside() if site.layer is None else self._layer(site)
        if unit is None:
            return None
        case = Case(self._given, unit, site, (site.tensor,))
        return case if site.tensor in case.candidate else None

    def _groups(self) -> Iterator[list[SiteResult]]:
        """Failing sites by layer call, in execution order."""
        groups: dict[tuple[str, int | None, int], list[SiteResult]] = {}
        for result in self._given.results.values():
            if result.verdict == "fail":
                groups.setdefault((result.stack, result.layer, result.call), []).append(result)
        yield from groups.values()

    def _case(self, failing: Sequence[SiteResult]) -> Case | None:
        first = failing[0]
        site = Site.parse(first.site)
        names = tuple(r.tensor for r in failing)
        if site.layer is None:
            case = Case(self._given, self._outside(), site, names)
        else:
            unit = self._layer(site)
            if unit is None:
                return None
            given = replace(self._given, precision=self._replayer.precision_of(site))
            case = Case(given, unit, site, names)
        return case if site.tensor in case.candidate else None

    def _follows(self, case: Case) -> bool:
        """Whether an output of the model holds no more than the layers do: it was not replayed, or the
        candidate's hidden states leave it as it was (keys and values of all layers in one tensor)."""
        if case.at.layer is not None:
            return False
        reference = self._given.reference(case.at)
        untouched = reference is not None and torch.equal(case.clean[case.tensor].cpu(), reference)
        return case.result.introduced is None or untouched

    def _layer(self, site: Site) -> LayerUnit | None:
        calls = {(c.stack, c.layer, c.call): c for c in self._probe.calls}
        call = calls.get((site.stack, site.layer or 0, site.call))
        if call is None or call.hidden_at is None:
            return None
        hidden = self._replayer.input_of(call)
        if hidden is None:
            hidden = self._given.reference(Site(call.layer - 1, "hidden", call.stack, call.call))
        if hidden is None:
            return None
        self._bring_in(call.module, call.module.modules())
        return LayerUnit(self._replayer, call, hidden, self._stack(site.stack))

    def _outside(self) -> OutsideUnit:
        model = self._probe.model
        inside = {id(m) for stack in self._probe.stacks for layer in stack.layers for m in layer.modules()}
        self._bring_in(model, (m for m in model.modules() if id(m) not in inside))
        return OutsideUnit(self._replayer, model)

    def _bring_in(self, unit: nn.Module, modules: Iterable[nn.Module]) -> None:
        """Has offloaded weights of a unit in its modules, and those of all but the last two units out."""
        if id(unit) in self._inside:
            self._inside[id(unit)] = self._inside.pop(id(unit))
            return
        while len(self._inside) > 1:
            self._inside.pop(next(iter(self._inside))).close()
        stack = self._inside[id(unit)] = contextlib.ExitStack()
        stack.enter_context(brought_in(modules))

    @contextlib.contextmanager
    def _offloading(self) -> Iterator[None]:
        """Takes out in the end what `_bring_in` brought in."""
        try:
            yield
        finally:
            while self._inside:
                self._inside.popitem()[1].close()

    def _stack(self, name: str) -> Sequence[Any]:
        return next((s.layers for s in self._probe.stacks if s.name == name), ())

    def _search(self, case: Case | None, found: Found, site: str) -> list[Tried]:
        """Searches a layer until nothing is left to explain; returns what was found.

        Args:
            case: the layer.
            found: is added to.
            site: where the error shows first, if it is not where it arises (NaN at padding).
        """
        results: list[Tried] = []
        for _ in range(_PER_LAYER):
            if case is None:
                break
            tried = investigate(case)
            self._runs += case.memory.get("runs", 0) * (_OF_KEYS if case.tensor in ("key", "value") else 1.0)
            case, tried = self._before(case, tried)
            found.hypotheses += [hypothesis_of(case, t) for t in tried]
            found.notes += case.notes
            shown = site if not results else str(case.at)
            if not tried or tried[0].fit is None or not tried[0].fit.convincing:
                found.causes.append(replace(_from_facts(case, found) or unknown(case, tried), site=shown))
                break
            best = tried[0]
            results.append(best)
            found.causes.append(replace(cause_of(case, best), site=shown))
            case = None if case.nonfinite else _remaining(case, best)
        return results

    def _before(self, case: Case, tried: list[Tried]) -> tuple[Case, list[Tried]]:
        """Where the candidate shows no hidden states and nothing was found in the layer itself: the layer
        before, whose output only the keys and values of this one show."""
        unit = case.unit
        if convinces(tried) or not isinstance(unit, LayerUnit) or not case.at.layer or case.applied:
            return case, tried
        before = Site(case.at.layer - 1, "hidden", case.at.stack, case.at.call)
        if self._given.candidate(before) is not None:
            return case, tried
        earlier = self._layer(before)
        if earlier is None:
            return case, tried
        spanning = LayerUnit(self._replayer, earlier.call, earlier.hidden, earlier.stack, after=unit.call)
        other = replace(case, unit=spanning, notes=[], memory={})
        again = investigate(other)
        return (other, again) if convinces(again) else (case, tried)


def _recognised(case: Case, known: Sequence[Tried]) -> Tried | None:
    """A fault found before that explains this case too."""
    modules = {module.ID: module for module in CAUSES}
    for tried in known:
        if tried.id not in modules:
            continue
        module = modules[tried.id]
        with noting(case, module):
            for trial in module.trials(case):
                if trial.key == tried.trial.key:
                    again = attempt(case, module.ID, trial)
                    if again is not None and again.fit is not None and again.fit.convincing:
                        return again
    return None


def _remaining(case: Case, tried: Tried) -> Case | None:
    """The case of what a fault leaves in the unit, None where that is within the limits."""
    fit = tried.fit
    if fit is None:
        return None
    # Explaining an error to within a few per cent leaves a rest of many times the floor in fp32.
    failing = [
        name
        for name in case.failing
        if fit.left.get(name, 0.0) > case.given.limit and fit.each.get(name, 0.0) < CONVINCING
    ]
    if not failing or failing[0] == case.tensor:
        return None
    return case.with_applied(tried.fault, case.site_of(failing[0]), tuple(failing))


def _extend(found: Found, again: Tried, case: Case, known: Sequence[Tried]) -> None:
    """Adds a site to a cause that was found before, or the same cause with another estimate."""
    if not any(_same_estimate(again, tried) for tried in known):
        found.causes.append(cause_of(case, again))
        return
    for i, cause in enumerate(found.causes):
        if cause.id == again.id:
            sites = [*cause.parameters.get("sites", [cause.site]), str(case.at)]
            found.causes[i] = replace(cause, parameters={**cause.parameters, "sites": sites})
            return


def _same_estimate(one: Tried, other: Tried) -> bool:
    """Whether two trials of one kind found the same, estimated parameter and all."""
    if (one.id, one.trial.key) != (other.id, other.trial.key):
        return False
    return math.isnan(one.value) or math.isclose(one.value, other.value, rel_tol=_ALIKE)


def _from_facts(case: Case, found: Found) -> Cause | None:
    """The first cause that facts alone tell."""
    for module in FROM_FACTS:
        told = module.facts(case)
        if told is not None:
            found.hypotheses.append(hypothesis_of(case, told))
            return cause_of(case, told)
    return None
