"""Estimates the parameter of a fault by Gauss and Newton's method."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from divergence.diagnosis.case import Case, share
from divergence.diagnosis.emulate import Fault

_STEPS = (1.0, 0.5, 0.25, 0.1)  # shares of a step of Newton's that are tried: it may lead too far
_SMALL = 0.03  # a step smaller than this, relative to the parameter, is not shortened


def estimate(
    case: Case,
    build: Callable[[float], Fault],
    starts: Sequence[float],
    *,
    step: float = 1e-2,
    rounds: int = 8,
) -> tuple[float, float]:
    """The parameter of a fault that explains the error best, by Gauss and Newton from the best start.

    Args:
        case: whose error.
        build: the fault of a parameter.
        starts: parameters to begin with.
        step: width of the difference that stands for the derivative, relative to the parameter.
        rounds: most refinements.

    Returns:
        The parameter and the share that it explains.
    """
    error = case.error[case.tensor]
    tried = [(value, case.emulated(build(value))) for value in starts]
    best, made = max(tried, key=lambda pair: share(error, pair[1]))
    explained = share(error, made)
    for _ in range(rounds):
        width = step * (abs(best) or 1.0)
        slope = (case.emulated(build(best + width)) - made) / width
        steep = float(slope.square().sum())
        if steep == 0.0 or not math.isfinite(steep):
            break
        move = float(((error - made) * slope).sum()) / steep
        for part in _STEPS:
            value = best + part * move
            again = case.emulated(build(value))
            now = share(error, again)
            if now > explained or abs(part * move) < _SMALL * abs(best):
                break
        if not now > explained:
            break
        gained, best, made, explained = now - explained, value, again, now
        if gained < 0.1 * (1.0 - explained) or explained > 1.0 - 0.3 * case.noise:
            break
    return best, explained
