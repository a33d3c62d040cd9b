"""A norm with another epsilon."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from divergence.diagnosis import parts
from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Fault
from divergence.diagnosis.hypotheses import Trial
from divergence.diagnosis.trace import Call, Handler

ID = "norm_eps"

_USUAL = (1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_LARGEST = 1.02e-2  # beyond it an epsilon fits many a loss of size that has nothing to do with the norm


def trials(case: Case) -> Iterator[Trial]:
    """All norms of the unit with another epsilon, then each alone; the epsilon is estimated."""
    found = [n for n in parts.norms(case.trace) if case.trace.reaches(case.tensor, n.root)]
    groups = [found] if len(found) > 1 else []
    groups += [[norm] for norm in found]
    for group in groups:
        known = group[0].epsilon
        which = "the norms run" if len(group) > 1 else f"norm {group[0].number + 1} of the layer runs"
        yield Trial(
            key="all" if len(group) > 1 else f"norm {group[0].number}",
            title=f"{which} with epsilon {{value:.3g}} instead of {known:g}",
            fault=_fault(group),
            starts=_starts(known),
            accept=partial(_is_other, known),
            parameters=partial(_reported, known),
            exact=lambda epsilon: epsilon > _LARGEST,
            fix=f"set the epsilon of the norm to {known:g} (rms_norm_eps, layer_norm_eps, variance_epsilon)",
        )


def _is_other(known: float, epsilon: float) -> bool:
    return 0 <= epsilon < 1 and abs(epsilon - known) > 1e-2 * known


def _reported(known: float, epsilon: float) -> dict[str, float]:
    return {"epsilon": rounded(epsilon), "reference": known}


def with_epsilon(norms: list[parts.Norm], epsilon: float) -> Mapping[int, Handler]:
    """Handlers that run `norms` with `epsilon`."""
    handlers: dict[int, Handler] = {}
    for norm in norms:
        handlers[norm.epsilon_at] = _fused(epsilon) if norm.fused else _added(norm.epsilon, epsilon)
    return handlers


def rounded(epsilon: float) -> float:
    """The usual epsilon that an estimate stands for, or the estimate."""
    if epsilon <= 0:
        return 0.0
    nearest = min(_USUAL, key=lambda usual: abs(math.log(epsilon / usual)))
    return nearest if abs(epsilon / nearest - 1) < 0.02 else epsilon


def _starts(known: float) -> tuple[float, ...]:
    return (0.0, *(e for e in _USUAL if abs(e - known) > 1e-2 * known))


def _fault(norms: list[parts.Norm]) -> Callable[[float], Fault]:
    return lambda epsilon: Fault(operators=lambda: with_epsilon(norms, max(epsilon, 0.0)))


def _fused(epsilon: float) -> Handler:
    def handler(call: Call) -> object:
        name = getattr(call.func, "__name__", "")
        return call.replaced(3 if "rms" in name else 4, "eps", epsilon).run()

    return handler


def _added(known: float, epsilon: float) -> Handler:
    """The operator adds `epsilon` where it added `known`."""

    def handler(call: Call) -> object:
        result = call.run()
        return result + (epsilon - known)

    return handler
