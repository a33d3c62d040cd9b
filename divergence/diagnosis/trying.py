"""Tries every cause on one case, cheapest first, and ranks what comes of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from divergence.diagnosis import narrow
from divergence.diagnosis.case import Case
from divergence.diagnosis.causes import CAUSES, NONFINITE
from divergence.diagnosis.hypotheses import CauseModule, Tried, attempt
from divergence.errors import one_line

CONVINCING = 0.9
"""A fault that explains less may be a part of what happened."""


def investigate(case: Case) -> list[Tried]:
    """The best trial of every cause, best first. Ends early when one leaves nothing but noise."""
    best: list[Tried] = []
    for module in NONFINITE if case.nonfinite else CAUSES:
        tried = _best(case, module)
        if tried is not None:
            best.append(tried)
            if is_settled(case, tried):
                break
    if best and not case.nonfinite and _is_of_weights(case, best):
        best = [replace(t, fit=t.fit and replace(t.fit, convincing=False)) for t in best]
    return sorted(best, key=lambda t: (t.fit is None or not t.fit.convincing, round(-t.rank, 1)))


def _is_of_weights(case: Case, best: Sequence[Tried]) -> bool:
    """Whether the candidate's own weights, in no way that is known, explain what none of the others does."""
    explained = max((t.fit.explained for t in best if t.fit and t.fit.convincing), default=1.0)
    if explained > CONVINCING:
        return False
    others = narrow.other_weights(case)
    return others is not None and others.explained > CONVINCING


def _best(case: Case, module: CauseModule) -> Tried | None:
    """The best trial of a cause, or the first that leaves nothing but noise."""
    best: Tried | None = None
    with noting(case, module):
        for trial in module.trials(case):
            made: Tried | None = None
            with noting(case, module):
                made = attempt(case, module.ID, trial)
            if made is not None and (best is None or made.rank > best.rank + 0.05):
                best = made
            if made is not None and is_settled(case, made):
                break
    return best


@contextlib.contextmanager
def noting(case: Case, module: CauseModule) -> Iterator[None]:
    """Makes a note, one for each cause, of what goes wrong: what a model's code cannot bear says nothing of
    the cause, and must not cost the others their turn."""
    try:
        yield
    except Exception as error:
        words = f"{module.ID} could not be emulated in {case.at} ("
        if not any(note.startswith(words) for note in case.notes):
            case.notes.append(f"{words}{one_line(error)})")


def convinces(tried: Sequence[Tried]) -> bool:
    """Whether the best of what was tried explains more than half."""
    return bool(tried) and tried[0].fit is not None and tried[0].fit.convincing


def is_settled(case: Case, tried: Tried) -> bool:
    """Whether what a fault leaves unexplained is noise, at every tensor of the unit."""
    fit = tried.fit
    if fit is None or fit.shown or not fit.convincing or tried.elsewhere:
        return False
    return fit.explained >= 1 - 4 * case.noise and fit.overall > 0.97 and fit.explained > 0.97
