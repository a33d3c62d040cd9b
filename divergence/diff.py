"""Two reports of the same comparison at different times: what became better or worse beyond noise.

A site's error is taken over its own noise floor, and what lies below the floor is noise: r = max(error /
floor, 1). A site changed when the ratio of ratios r_new / r_old is above `factor`, or below 1 / factor.
Two runs of one candidate on other kernels stay within a factor of two of each other (docs/judging.md), so
that is the default. Where a report has no floors (absolute limits), the rounding that storing the tensor
costs stands in for one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from divergence.errors import AlignmentError, ConfigurationError
from divergence.precision import UNIT_ROUNDOFF, coarsest
from divergence.result import Comparison, SiteResult

FACTOR = 2.0

Kind = Literal["worse", "better", "same", "added", "removed"]


@dataclass(frozen=True)
class Change:
    """What became of a site.

    Attributes:
        site: which.
        kind: `added` and `removed` are sites that only one report has, and that count for nothing.
        old, new: error over noise floor in either report, None where it is not known.
        change: ratio of the two, each taken as 1 at least; None where one is not known.
        reason: in words.
    """

    site: str
    kind: Kind
    old: float | None
    new: float | None
    change: float | None
    reason: str


@dataclass(frozen=True)
class ReportDiff:
    """All changes from one report to another.

    Attributes:
        verdict: `regressed` when a site became worse, `improved` when none did and one became better,
            `error` when the new report answers no question.
        reason: in a sentence.
        changes: of every site, in the order of the new report.
        notes: what else changed that bears on the figures.
        factor: from which ratio of ratios on a change is more than noise.
    """

    verdict: Literal["regressed", "improved", "unchanged", "error"]
    reason: str
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    factor: float

    def of(self, kind: Kind) -> tuple[Change, ...]:
        """The changes of one kind."""
        return tuple(change for change in self.changes if change.kind == kind)


def diff(old: Comparison, new: Comparison, factor: float = FACTOR) -> ReportDiff:
    """Compares two reports site by site.

    Args:
        old: the report to measure against.
        new: the report in question.
        factor: ratio of ratios from which a change is more than noise; above 1.

    Raises:
        AlignmentError: the reports have no site in common.
        ConfigurationError: `factor` is not above 1.
    """
    if not (math.isfinite(factor) and factor > 1):
        raise ConfigurationError(f"factor {factor:g}: a change beyond noise is a factor above 1; give 2")
    notes = _notes(old, new)
    if not new.sites:
        return ReportDiff("error", f"the new report answers nothing: {new.reason}", (), notes, factor)
    before = {site.site: site for site in old.sites}
    if not any(site.site in before for site in new.sites):
        raise AlignmentError(
            f"the reports have no site in common (old {_names(old)}, new {_names(new)}); "
            "give two reports of the same model"
        )
    changes = [
        _change(before[site.site], site, factor)
        if site.site in before
        else Change(site.site, "added", None, _ratio(site), None, "not in the old report")
        for site in new.sites
    ]
    changes += _gone(old, new)
    return _judged(tuple(changes), notes, factor)


def _judged(changes: tuple[Change, ...], notes: tuple[str, ...], factor: float) -> ReportDiff:
    worse = [c for c in changes if c.kind == "worse"]
    better = [c for c in changes if c.kind == "better"]
    if worse:
        more = f", and {len(worse) - 1} more" if len(worse) > 1 else ""
        return ReportDiff("regressed", f"{worse[0].site} {worse[0].reason}{more}", changes, notes, factor)
    if better:
        more = f", and {len(better) - 1} more" if len(better) > 1 else ""
        return ReportDiff("improved", f"{better[0].site} {better[0].reason}{more}", changes, notes, factor)
    return ReportDiff("unchanged", f"no site changed by more than {factor:g}x", changes, notes, factor)


def _names(report: Comparison) -> str:
    names = [site.site for site in report.sites]
    return f"'{names[0]}' and {len(names) - 1} more" if names else "none at all"


def _change(old: SiteResult, new: SiteResult, factor: float) -> Change:
    was, now = _ratios(old, new)
    change = None
    if was is not None and now is not None:
        change = max(now, 1.0) / max(was, 1.0)

    def found(kind: Kind, reason: str) -> Change:
        return Change(new.site, kind, was, now, change, reason)

    broke, mended = _nonfinite(new) and not _nonfinite(old), _nonfinite(old) and not _nonfinite(new)
    if broke or mended:
        return found("worse" if broke else "better", "became NaN or Inf" if broke else "is finite again")
    if new.verdict == "error" and old.verdict != "error":
        return found("worse", f"can no longer be judged: {new.reason}")
    if old.verdict == "error" and new.verdict != "error":
        if new.verdict == "fail":
            return found("worse", "could not be judged before, and fails now")
        return found("better", "could not be judged before, and passes now")
    if change is not None and (change > factor or change < 1 / factor):
        said = f"error over floor went from {was:.3g}x to {now:.3g}x"
        return found("worse" if change > factor else "better", said)
    if change is None and old.verdict != new.verdict:
        return found(
            "worse" if new.verdict == "fail" else "better", f"{old.verdict} before, {new.verdict} now"
        )
    crossed = f"{old.verdict} before, {new.verdict} now, by no more than noise"
    return found("same", crossed if old.verdict != new.verdict else "within noise")


def _ratios(old: SiteResult, new: SiteResult) -> tuple[float | None, float | None]:
    """Error over floor in both reports, of the same kind in both: what the layer introduced where the
    new report knows it. Where the old one did not replay, all of its sites passed cumulatively, and
    that ratio bounds it."""
    if new.introduced_ratio is None or new.bit_equal:
        return _ratio(old, cumulative=True), _ratio(new, cumulative=True)
    return _ratio(old), _ratio(new)


def _ratio(site: SiteResult, *, cumulative: bool = False) -> float | None:
    if site.bit_equal:
        return 0.0
    ratio = site.ratio if cumulative or site.introduced_ratio is None else site.introduced_ratio
    if ratio is not None:
        return ratio
    precision = coarsest(filter(None, (site.ref_dtype, site.cand_dtype)))
    if site.rel_l2 is None or precision is None:
        return None
    return site.rel_l2 / (UNIT_ROUNDOFF[precision] / 2)


def _nonfinite(site: SiteResult) -> bool:
    return site.cand_nonfinite > site.ref_nonfinite


def _gone(old: Comparison, new: Comparison) -> list[Change]:
    """Sites that the new report has not: worse, unless they were excluded by name."""
    here = {site.site for site in new.sites}
    excluded = {u.site for u in new.unmatched if u.state == "excluded"}
    return [
        Change(site.site, "removed", _ratio(site), None, None, "excluded by name now")
        if site.site in excluded
        else Change(site.site, "worse", _ratio(site), None, None, "is no longer compared")
        for site in old.sites
        if site.site not in here
    ]


def _notes(old: Comparison, new: Comparison) -> tuple[str, ...]:
    """What differs in how the two reports came about."""
    watched: list[tuple[str, Any, Any]] = [
        ("the precision judged by", old.policy.precision, new.policy.precision),
        ("the policy", old.policy.policy, new.policy.policy),
        ("the limit", old.policy.ratio, new.policy.ratio),
        ("the digest of the inputs", _fact(old, "inputs_digest"), _fact(new, "inputs_digest")),
        (
            "the digest of the reference's model",
            _fact(old, "reference", "model_digest"),
            _fact(new, "reference", "model_digest"),
        ),
    ]
    return tuple(
        f"{name} changed from {was or 'none'} to {now or 'none'}"
        for name, was, now in watched
        if was != now and (was or now)
    )


def _fact(report: Comparison, *path: str) -> Any:
    value: Any = report.environment
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
