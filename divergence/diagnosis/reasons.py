"""Puts what was found into words: causes and hypotheses with their evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from divergence.diagnosis import narrow, nonfinite
from divergence.diagnosis.case import ENOUGH, Case, figure
from divergence.diagnosis.hypotheses import Tried
from divergence.result import Cause, Hypothesis


def cause_of(case: Case, tried: Tried) -> Cause:
    """The cause that a trial proves."""
    evidence, _ = _evidence(case, tried)
    fit = tried.fit
    return Cause(
        tried.id,
        _title(tried),
        evidence,
        fit.explained if fit else None,
        tried.trial.fix,
        str(case.at),
        tried.trial.reported(tried.value),
    )


def _title(tried: Tried) -> str:
    return tried.trial.title.format(value=tried.value)


def hypothesis_of(case: Case, tried: Tried) -> Hypothesis:
    """What became of a trial, whether it explains anything or not."""
    evidence, against = _evidence(case, tried)
    return Hypothesis(
        str(case.at),
        tried.id,
        _title(tried),
        evidence,
        against,
        tried.trial.reported(tried.value),
        tried.fit.explained if tried.fit else None,
        tried.fit.overall if tried.fit else None,
        tried.trial.fix,
    )


def _evidence(case: Case, tried: Tried) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What speaks for and against a trial: the shares, tensor by tensor, and what the cause adds."""
    supporting, against = list(tried.evidence), list(tried.against)
    fit = tried.fit
    if fit is not None:
        for name, explained in fit.each.items():
            what = "places that are not finite" if case.nonfinite else "error"
            words = (
                f"put into the reference it explains {100 * explained:.4g} % of the {what} of "
                f"{case.site_of(name)}"
            )
            (supporting if explained > ENOUGH else against).append(words)
        for name, times in fit.shown.items():
            against.append(f"it would show at {case.site_of(name)} ({times:.3g}x the floor), which passes")
        if fit.explained > ENOUGH:
            supporting += tried.trial.evidence(case, tried.value)
            supporting += list(nonfinite.facts(case)) if case.nonfinite else _untouched(case, fit.each)
    return tuple(supporting), tuple(against)


def _untouched(case: Case, each: Mapping[str, float]) -> list[str]:
    """Sentences on tensors of the layer that pass."""
    return [
        f"{case.site_of(name)} passes ({figure(result.introduced_ratio or result.ratio)}x its floor), as "
        "it should"
        for name in case.error
        if name not in each and (result := case.result_of(name)) is not None and result.verdict == "pass"
    ]


def unknown(case: Case, tried: Sequence[Tried]) -> Cause:
    """That no trial explains the error, with the facts that narrow it."""
    closest = [
        f"{t.id} {100 * t.fit.explained:.3g} %"
        for t in tried[:3]
        if t.fit is not None and t.fit.explained > 0.02
    ]
    evidence = list(nonfinite.facts(case)) if case.nonfinite else narrow.facts(case)
    if closest:
        evidence.append(f"closest of {len(tried)} causes tried: {', '.join(closest)} of the error explained")
    else:
        evidence.append(f"none of {len(tried)} causes tried explains any of the error")
    title = "no known cause explains more than half of the error"
    fix = f"replay {case.at} alone with --repro DIR, and compare inside the layer with --detail"
    others = None if case.nonfinite else narrow.other_weights(case)
    if others is not None:
        title, fix = others.title, others.fix
        evidence.insert(0, others.evidence)
    return Cause("unknown", title, tuple(evidence), None, fix, str(case.at))
