"""Blame: which step of a chain brought an error in.

A step is to blame at a site where its candidate fails against the reference and the one before did
not, or failed by far less. Both errors are judged by the noise floor of the *later* one: an error
that a bf16 wrapper may have, and that an fp32 engine built from it inherits, is not the engine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from divergence.chain_result import Difference, Step
from divergence.config import Tolerance
from divergence.result import Comparison, SiteResult, Unmatched
from divergence.sites import Site

# Where the candidate before has failed already, noise alone carries sites across the limit: a
# step has to add as much again as was there.
_AS_MUCH_AGAIN = 2.0

Share = Literal["", "brings", "tips"]


def judge_step(
    from_: str,
    to: str,
    before: Comparison | None,
    after: Comparison,
    differences: Sequence[Difference],
    tolerance: Tolerance,
) -> Step:
    """Judges the step from one candidate to the next.

    Args:
        from_, to: labels of both.
        before: the one before against the reference; None where it is the reference.
        after: the candidate against the reference.
        differences: between the two, by site in execution order.
        tolerance: what both were judged by.
    """
    step = _measured(from_, to, differences)
    direct = {difference.site: difference for difference in differences}
    prior = {site.site: site for site in before.sites} if before is not None else {}
    failed_before = before is not None and before.verdict == "fail"
    brought: list[tuple[SiteResult, Share]] = []
    for site in after.sites:
        limit = tolerance.ratio_at(Site(site.layer, site.tensor, site.stack, site.call))
        equal = site.site in direct and direct[site.site].bit_equal
        share = "" if equal else _share(prior.get(site.site), site, limit, failed_before=failed_before)
        if share:
            brought.append((site, share))
    if brought:
        first, share = brought[0]
        return replace(
            step,
            verdict="fail",
            site=first.site,
            sentence=_accusation(from_, first, share, prior.get(first.site), before, len(brought) - 1),
        )
    lost = _lost(before, after)
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        sentence = f"lacks {lost[0].site}{more} ({lost[0].state}), which {from_} has"
        return replace(step, verdict="fail", site=lost[0].site, sentence=sentence)
    unclear = [s for s in after.sites if s.verdict == "error" and _verdict(prior.get(s.site)) != "error"]
    if unclear:
        return replace(
            step, verdict="error", sentence=f"cannot be told at {unclear[0].site}: {unclear[0].reason}"
        )
    if not differences:
        return replace(
            step, verdict="error", sentence=f"cannot be told: it has no site in common with {from_}"
        )
    return replace(step, sentence=_acquittal(step, before, after))


def _measured(from_: str, to: str, differences: Sequence[Difference]) -> Step:
    """The step with its figures and no judgement."""
    worst = max(differences, key=lambda d: d.rel_l2 or 0.0, default=None)
    return Step(
        from_=from_,
        to=to,
        verdict="pass",
        sentence="",
        bit_equal=bool(differences) and all(d.bit_equal for d in differences),
        rel_l2=worst.rel_l2 if worst is not None else None,
        rel_l2_at=worst.site if worst is not None and worst.rel_l2 else None,
        differences=tuple(differences),
    )


def _share(before: SiteResult | None, after: SiteResult, limit: float, *, failed_before: bool) -> Share:
    """What a step has to do with the error of `after`: it brings it in, it tips a site over the limit
    that was close to it, or nothing."""
    if after.verdict != "fail":
        return ""
    if before is None or after.cand_nonfinite > before.cand_nonfinite:
        return "brings"
    prior, now, in_floors = _comparable(before, after)
    if prior is None or now is None:
        return "brings" if before.verdict != "fail" else ""
    if before.verdict == "fail" or (in_floors and prior > limit):
        return "brings" if now > limit * prior else ""
    if now > _AS_MUCH_AGAIN * prior:
        return "brings"
    return "" if failed_before else "tips"


def _comparable(before: SiteResult, after: SiteResult) -> tuple[float | None, float | None, bool]:
    """The errors of both in one unit, and whether that unit is the noise floor of `after`."""
    if after.introduced_ratio is not None:
        prior = _rescaled(before.introduced_ratio, before.introduced_floor, after.introduced_floor)
        return 0.0 if before.bit_equal else prior, after.introduced_ratio, True
    if after.ratio is not None:
        prior = _rescaled(before.ratio, before.floor, after.floor)
        return 0.0 if before.bit_equal else prior, after.ratio, True
    return before.rel_l2, after.rel_l2, False


def _rescaled(ratio: float | None, floor: float | None, other: float | None) -> float | None:
    """A ratio to `floor` as one to the `other` floor."""
    return None if ratio is None or floor is None or not other else ratio * floor / other


def _verdict(site: SiteResult | None) -> str:
    return "" if site is None else site.verdict


def _lost(before: Comparison | None, after: Comparison) -> list[Unmatched]:
    """The sites of the reference that `after` lacks and the one before does not."""

    def lacking(comparison: Comparison) -> list[Unmatched]:
        return [u for u in comparison.unmatched if u.state in ("missing in candidate", "shape mismatch")]

    known = {u.site for u in lacking(before)} if before is not None else set()
    return [u for u in lacking(after) if u.site not in known]


def _accusation(
    from_: str, site: SiteResult, share: Share, prior: SiteResult | None, before: Comparison | None, more: int
) -> str:
    what = "brings an error in at" if share == "brings" else "takes over the limit, from close to it,"
    others = f" (and at {more} more site{'s' if more > 1 else ''})" if more else ""
    sentence = f"{what} {site.site}{others}: {site.reason}"
    return sentence if before is None else f"{sentence}; {from_} {_there(prior)}"


def _there(prior: SiteResult | None) -> str:
    if prior is None:
        return "does not have this site"
    if prior.bit_equal:
        return "is equal to the bit there"
    if prior.introduced is not None:
        return f"introduces {prior.introduced:.2g} there"
    return "has no error to compare there" if prior.rel_l2 is None else f"is off by {prior.rel_l2:.2g} there"


def _acquittal(step: Step, before: Comparison | None, after: Comparison) -> str:
    if step.bit_equal:
        sentence = "equal to the bit"
    elif step.rel_l2_at is None:
        sentence = "brings no error in"
    else:
        sentence = f"brings no error in; the largest difference is {step.rel_l2:.2g} at {step.rel_l2_at}"
    first = after.first_divergence
    if before is None:
        return sentence
    if first is not None and before.verdict == "fail":
        return f"{sentence}; what fails at {first.site} was there before"
    if first is not None:
        return (
            f"{sentence}; {first.site} fails by the lower noise floor of {after.policy.precision}, which "
            f"the error of {step.from_} exceeds too"
        )
    if before.first_divergence is not None:
        return f"{sentence}; the error of {step.from_} at {before.first_divergence.site} is gone"
    return sentence
