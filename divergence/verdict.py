"""The verdict: of each site, and of the comparison. It fails closed: what cannot be answered is an
error, never a pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from divergence.errors import counted
from divergence.result import METRICS, FirstDivergence, SiteResult, Unmatched, Verdict

if TYPE_CHECKING:
    from divergence.comparison.metrics import Metrics
    from divergence.config import Tolerance
    from divergence.introduced import Introduced
    from divergence.noise import Floor
    from divergence.sites import Site

# An error of this size is the smallest that a comparison is asked to find. Where the floor of
# every site lets the cumulative error show it, a passing comparison needs no replay.
RESOLUTION = 1e-3


@dataclass(frozen=True)
class Judgement:
    """What is said of one site."""

    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class Exceeded:
    """An absolute limit that a site exceeds."""

    metric: str
    value: float
    limit: float

    @property
    def side(self) -> str:
        """`above` or `below`: on which side of the limit the value lies."""
        return "below" if METRICS[self.metric].better == "higher" else "above"

    def __str__(self) -> str:
        # Six digits: a cosine of 0.99897 must not read as the 0.999 that it misses.
        return f"{self.metric} {self.value:.6g} is {self.side} the limit {self.limit:g}"


def judge(
    site: Site,
    metrics: Metrics,
    floor: Floor | None,
    introduced: Introduced | None,
    tolerance: Tolerance,
    unseen_inf: str = "",
) -> Judgement:
    """Judges one site.

    Args:
        site: which.
        metrics: candidate against reference.
        floor: noise floor of the cumulative error, or None where none was taken.
        introduced: what replay says, or None where the site could not be replayed.
        tolerance: what to judge by.
        unseen_inf: why Inf in the candidate's tensor does not count, or "".
    """
    only_candidate = metrics.elements - metrics.compared - metrics.ref_nonfinite
    if metrics.elements == 0:
        return Judgement("error", "no valid token to compare")
    if only_candidate > 0 and not unseen_inf:
        return Judgement(
            "fail",
            f"{only_candidate} of {metrics.elements} values are NaN or Inf where the reference's are finite",
        )
    if metrics.unlike_inf:
        return Judgement(
            "fail",
            f"{metrics.unlike_inf} of {metrics.elements} values are others where the reference's are Inf",
        )
    if metrics.compared == 0:
        return Judgement("error", "no position is finite on both sides")
    if metrics.unlike_nan:
        return Judgement(
            "error",
            f"the reference is NaN at {metrics.unlike_nan} of {metrics.elements} values where the candidate "
            "is not: mend the reference, mask these tokens (attention_mask), or exclude the site",
        )
    if metrics.bit_equal:
        return Judgement("pass", "equal to the bit")
    by_limits = _by_limits(metrics, introduced, tolerance.limits(site))
    if by_limits.verdict != "pass":
        return by_limits
    if not tolerance.judges_by_floor(site):
        return Judgement("pass", unseen_inf)
    judged = _by_floor(site, metrics, floor, introduced, tolerance)
    return Judgement("pass", unseen_inf) if judged.verdict == "pass" and unseen_inf else judged


def exceeded_limits(figures: Mapping[str, float | None], limits: Mapping[str, float]) -> list[Exceeded]:
    """The absolute limits that are exceeded.

    Args:
        figures: by metric; of those that are None or missing no limit can be exceeded.
        limits: by metric, of `divergence.result.METRICS`.
    """
    found = []
    for metric, limit in limits.items():
        value = figures.get(metric)
        if value is None:
            continue
        kept = value >= limit if METRICS[metric].better == "higher" else value <= limit
        if not kept:  # as it is for NaN
            found.append(Exceeded(metric, value, limit))
    return found


def _by_limits(metrics: Metrics, introduced: Introduced | None, limits: Mapping[str, float]) -> Judgement:
    figures = {metric: getattr(metrics, metric, None) for metric in limits}
    if introduced is not None:
        figures |= {"introduced": introduced.metrics.rel_l2, "introduced_ratio": introduced.ratio}
    exceeded = exceeded_limits(figures, limits)
    if exceeded:
        return Judgement("fail", str(exceeded[0]))
    for metric, limit in limits.items():
        if figures[metric] is None:
            replay = metric.startswith("introduced") and introduced is None
            why = "the site was not replayed" if replay else "it does not exist for these tensors"
            return Judgement("error", f"{metric} has a limit ({limit:g}) and no value here: {why}")
    return Judgement("pass")


def _by_floor(
    site: Site, metrics: Metrics, floor: Floor | None, introduced: Introduced | None, tolerance: Tolerance
) -> Judgement:
    limit = tolerance.ratio_at(site)
    used = introduced.floor if introduced is not None else floor
    cumulative = floor.ratio(metrics) if floor is not None else None
    if used is None:
        return Judgement("error", "no noise floor to judge by; give --tolerance or --floor SRC")
    if used.overflow:
        return Judgement(
            "error", "the reference itself overflows here in this precision; judge it by absolute limits"
        )
    ratio = introduced.ratio if introduced is not None else cumulative
    if ratio is None:
        return Judgement("error", "there is no relative error to judge: the reference is zero here")
    if ratio <= limit:
        if introduced is not None and cumulative is not None and cumulative > limit:
            return Judgement("pass", f"propagated: {cumulative:.3g}x the floor comes from earlier layers")
        return Judgement("pass")
    error = (introduced.metrics if introduced is not None else metrics).rel_l2 or 0.0
    what = "introduces a relative error of" if introduced is not None else "has a relative error of"
    floor_name = "this layer's noise floor" if introduced is not None else "the noise floor"
    return Judgement("fail", f"{what} {error:.2g}, {ratio:.3g}x {floor_name} (limit {limit:g}x)")


def conclusive(results: Sequence[tuple[Judgement, Floor | None]], ratio: float) -> bool:
    """Whether the cumulative errors alone settle that the candidate passes: all do, and the floor
    is nowhere so high that an error of `RESOLUTION` could hide below it."""
    return all(
        judged.verdict == "pass" and (floor is None or floor.rel_l2 * ratio <= RESOLUTION)
        for judged, floor in results
    )


def first_divergence(results: Sequence[SiteResult]) -> FirstDivergence | None:
    """The first failing site; `results` are in execution order."""
    for result in results:
        if result.verdict == "fail":
            return FirstDivergence(result.site, result.stack, result.layer, result.tensor)
    return None


def of_several(verdicts: Sequence[Verdict], noun: str) -> tuple[Verdict, str]:
    """The verdict of several comparisons, and how many say so in a sentence.

    One that could not be answered makes the whole an error, whatever the others say: nobody knows how many
    fail. Without any comparison nothing has been answered.

    Args:
        verdicts: of the comparisons.
        noun: what one is called.
    """
    number = len(verdicts)
    if not number:
        return "error", "Nothing was compared"
    failing = verdicts.count("fail")
    fail = f"{failing} {'fails' if failing == 1 else 'fail'}"
    if errors := verdicts.count("error"):
        others = f", {fail}" if failing else ""
        return "error", f"{errors} of {number} {noun}s could not be answered{others}"
    if failing:
        return "fail", f"{failing} of {number} {noun}s {'fails' if failing == 1 else 'fail'}"
    return "pass", f"All {noun}s pass"


def overall(results: Sequence[SiteResult], unmatched: Sequence[Unmatched]) -> tuple[Verdict, str]:
    """Verdict and reason of the whole comparison."""
    missing = [u for u in unmatched if u.state in ("missing in candidate", "shape mismatch")]
    failing = [r for r in results if r.verdict == "fail"]
    broken = [r for r in results if r.verdict == "error"]
    if not results:
        return "error", "no site could be compared"
    if failing:
        first = failing[0]
        more = len(failing) - 1
        also = f", and {more} more site{'s fail' if more > 1 else ' fails'}" if more else ""
        return "fail", f"{first.site} {first.reason}{also}"
    if missing:
        were, them = ("was", "it") if len(missing) == 1 else ("were", "them")
        return "fail", (
            f"{counted(len(missing), 'site')} of the reference {were} not compared, {_first(missing)} "
            f"({missing[0].state}); map {them} in the configuration, or exclude {them} by name"
        )
    if broken:
        return (
            "error",
            f"{counted(len(broken), 'site')} could not be judged, {_first(broken)}: {broken[0].reason}",
        )
    equal = sum(r.bit_equal for r in results)
    held = "equal to the bit" if equal == len(results) else "within their limits"
    if len(results) == 1:
        return "pass", f"the only site is {held.replace('their', 'its')}"
    return "pass", f"all {len(results)} sites are {held}"


def _first(of: Sequence[SiteResult | Unmatched]) -> str:
    return of[0].site if len(of) == 1 else f"the first {of[0].site}"
