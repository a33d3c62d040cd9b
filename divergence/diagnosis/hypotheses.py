"""A trial: a fault to emulate. A hypothesis: what became of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from divergence.diagnosis.case import Case, Fit, Given
from divergence.diagnosis.emulate import Fault
from divergence.diagnosis.estimate import estimate
from divergence.diagnosis.weights import agrees

Build = Callable[[float], Fault]

_ELSEWHERE = 0.5
"""Taken off the rank of what the candidate's own weights speak against."""


@dataclass(frozen=True)
class Trial:
    """A fault to put into the reference.

    Attributes:
        key: tells it from the other trials of its cause; the same in every layer.
        title: what is wrong, in words, `{value}` standing for the estimated parameter.
        fault: the fault itself, or what makes it of a parameter that is estimated.
        fix: the setting or code to change.
        starts: where the estimate begins; none where there is nothing to estimate.
        parameters: what to report, or what makes it of the estimate.
        accept: whether the estimate means this cause at all.
        evidence: sentences for it beside those that follow from the fit, given the estimate.
        prior: added to the rank; below 0 for what is unlikely unless it explains clearly more.
        exact: whether, given the estimate, nothing but rounding may be left of the error and of the
            candidate's tensor: a weight is zero or it is not.
    """

    key: str
    title: str
    fault: Fault | Build
    fix: str
    starts: tuple[float, ...] = ()
    parameters: Mapping[str, Any] | Callable[[float], Mapping[str, Any]] = field(default_factory=dict)
    accept: Callable[[float], bool] = lambda _: True
    evidence: Callable[[Case, float], Iterable[str]] = lambda _case, _value: ()
    prior: float = 0.0
    exact: Callable[[float], bool] = lambda _: False

    def reported(self, value: float) -> dict[str, Any]:
        """The parameters, given the estimate."""
        return dict(self.parameters(value) if callable(self.parameters) else self.parameters)


@dataclass(frozen=True)
class Tried:
    """A trial that was made.

    Attributes:
        id: of its cause.
        trial: which.
        fit: how well it explains the error; None where the cause is told from facts alone.
        value: the estimated parameter; NaN where none was.
        fault: as put in.
        rank: higher is better; see `rank`.
        elsewhere: the candidate's own weights show that others were changed than those of the fault, though
            it comes to the same.
        evidence, against: sentences beside those that follow from the fit.
    """

    id: str
    trial: Trial
    fit: Fit | None
    value: float = math.nan
    fault: Fault = field(default_factory=Fault)
    rank: float = 0.0
    elsewhere: bool = False
    evidence: tuple[str, ...] = ()
    against: tuple[str, ...] = ()


@dataclass(frozen=True)
class Told:
    """A cause that the facts of the run tell, without an emulation.

    Attributes:
        id, title, fix: as of `divergence.result.Cause`.
        evidence: sentences.
    """

    id: str
    title: str
    evidence: tuple[str, ...]
    fix: str


class CauseModule(Protocol):
    """A file in `divergence.diagnosis.causes` whose faults are emulated."""

    ID: str

    def trials(self, case: Case) -> Iterator[Trial]:
        """The faults of this kind that could be behind the case, likeliest first."""


class FactsCauseModule(Protocol):
    """A file in `divergence.diagnosis.causes` whose cause may be told without an emulation."""

    ID: str

    def facts(self, case: Case) -> Tried | None:
        """What figures of the case, or the engine's contract, say by themselves."""


class ToldCauseModule(Protocol):
    """A file in `divergence.diagnosis.causes` whose cause the run tells."""

    ID: str

    def told(self, given: Given) -> Told | None:
        """What the probe found out while it ran the candidate."""


def attempt(case: Case, cause: str, trial: Trial) -> Tried | None:
    """Puts a trial's fault in; None where its estimate belongs to another cause, or where it changes
    nothing at the site."""
    value = math.nan
    if isinstance(trial.fault, Fault):
        fault = trial.fault
    else:
        value, _ = estimate(case, trial.fault, trial.starts)
        if not trial.accept(value):
            return None
        fault = trial.fault(value)
    fit = case.fit(fault)
    if fit.explained == 0.0 and not case.nonfinite:
        return None
    elsewhere = fit.convincing and not agrees(case, fault)
    if fit.convincing and (elsewhere or trial.exact(value)) and not case.leaves_rounding(fit):
        fit = replace(fit, convincing=False)
    ranked = rank(case, fit) + trial.prior - (_ELSEWHERE if elsewhere else 0.0)
    return Tried(cause, trial, fit, value, fault, ranked, elsewhere)


def rank(case: Case, fit: Fit) -> float:
    """How good an explanation is: minus the logarithm of what it leaves, at the site and over all tensors
    of the unit; what the noise makes up counts as explained."""
    left = [max(1.0 - x, case.noise, 1e-9) for x in (fit.explained, fit.overall)]
    return -sum(math.log10(x) for x in left) / 2
