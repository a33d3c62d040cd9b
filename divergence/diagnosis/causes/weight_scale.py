"""A weight that is too large or too small by one factor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from divergence.diagnosis import parts, weights
from divergence.diagnosis.case import ENOUGH, Case
from divergence.diagnosis.emulate import Fault
from divergence.diagnosis.estimate import estimate
from divergence.diagnosis.hypotheses import Trial

ID = "weight_scale"

_FIX = (
    "compare '{name}' in the checkpoint and in the export: a scale was applied twice, left out, "
    "or folded wrongly"
)
_SMALLEST = 1e-5
_NEARLY_GONE = 0.1  # a gain smaller than this fits whatever lacks what the weight makes


def trials(case: Case) -> Iterator[Trial]:
    """Every weight that the site depends on, times a gain."""
    matrices = weights.matrices(case)
    # A fused weight after the gain of the norm before it, which comes to the same.
    for part in [*matrices, *weights.gains(case), *weights.biases(case), *weights.fused(matrices)]:
        if not only_through_scores(case, part):
            yield _trial(str(part), f"'{part}' is {{value:.4g}} times the reference's", _scaled(part))
    if case.is_layer and case.at.layer == 0:
        title = "what enters the first layer (the embedding) is {value:.4g} times the reference's"
        yield _trial("input", title, _given)
        shown = _gain_that_hidden_shows(case)
        if shown is not None:
            yield replace(
                _trial("input", title.format(value=shown), _given),
                fault=_given(shown),
                starts=(),
                parameters={"parameter": "input", "gain": shown},
            )


def _given(gain: float) -> Fault:
    return Fault(hidden=lambda hidden: hidden * gain)


def _gain_that_hidden_shows(case: Case) -> float | None:
    """The gain of what enters the first layer, by its hidden state: keys and values come after a norm, which
    leaves no more of a gain than an epsilon does."""
    if case.tensor == "hidden" or "hidden" not in case.failing:
        return None
    at = replace(case, at=case.site_of("hidden"), failing=("hidden",), memory={})
    gain, explained = estimate(at, _given, (1.0, 2.0, 0.1, 10.0))
    return gain if explained > ENOUGH and abs(gain - 1) > _SMALLEST else None


def only_through_scores(case: Case, part: weights.Part) -> bool:
    """Whether a weight acts through the attention scores alone: its gain is the attention's scale."""
    trace, name = case.trace, part.name
    if part.role:
        return part.role == "query"
    found = parts.attentions(trace)
    if not found or name in trace.reaching("key") | trace.reaching("value"):
        return False
    reached = {
        parameter
        for attention in found
        if attention.fused is None
        for index in trace.ancestors(attention.scores)
        for parameter in trace.operators[index].parameters
    }
    fused = [a.fused for a in found if a.fused is not None]
    for index in fused:
        query = trace.operators[index].inputs[0]
        if query is not None:
            reached |= {p for i in trace.ancestors(query) for p in trace.operators[i].parameters}
    return name in reached and case.tensor == "hidden"


def _trial(name: str, title: str, fault: Callable[[float], Fault]) -> Trial:
    return Trial(
        key=name,
        title=title,
        fault=fault,
        starts=(1.0, 0.0),
        accept=lambda gain: abs(gain) > 1e-5 and abs(gain - 1) > 1e-5,
        parameters=lambda gain: {"parameter": name, "gain": gain},
        fix=_FIX.format(name=name),
        exact=lambda gain: abs(gain) < _NEARLY_GONE,
    )


def _scaled(part: weights.Part) -> Callable[[float], Fault]:
    return lambda gain: weights.fault([part], lambda weight: weight * gain)
