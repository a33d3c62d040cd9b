"""A comparison in plain words, for a reader who does not know what a key is.

The page and the summary say the same; every figure comes from the `Comparison`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from divergence.reports import counted, exceeded_limits, figure, in_words, judged, number, times
from divergence.result import METRICS, Comparison, Policy, SiteResult

TENSORS = {
    "key": "what a token offers for others to attend to",
    "value": "what a token hands on when it is attended to",
    "query": "what a token looks for in others",
    "hidden": "the output of the layer",
    "attention": "the output of the attention",
    "mlp": "the output of the feed-forward part",
    "input_norm": "the normalised input of the attention",
    "post_norm": "the normalised input of the feed-forward part",
    "cross_key": "the encoder's keys",
    "cross_value": "the encoder's values",
    "cross_attention": "the output of the attention to the encoder",
}

_NAMES = {
    "hidden": "hidden state",
    "input_norm": "input norm",
    "post_norm": "norm before the feed-forward part",
    "attention": "attention output",
    "mlp": "feed-forward output",
    "cross_key": "cross key",
    "cross_value": "cross value",
    "cross_attention": "cross-attention output",
}


@dataclass(frozen=True)
class Story:
    """What there is to say first.

    Attributes:
        headline: the verdict in a sentence.
        detail: what it rests on.
        where: the place of the first divergence, in words; "" where there is none.
        size: how large the error is there.
        spread: what became of it further on.
    """

    headline: str
    detail: str
    where: str = ""
    size: str = ""
    spread: str = ""


def story(comparison: Comparison) -> Story:
    """Verdict, place and size of a comparison in plain words."""
    if comparison.verdict == "error":
        said = _capital(comparison.reason or "no reason was given").rstrip(".")
        return Story("The question could not be answered", f"{said}.")
    if comparison.verdict == "pass":
        return _passed(comparison)
    site = first_site(comparison)
    if site is None:
        return Story("The candidate could not be compared in full", comparison.reason)
    what, how = TENSORS.get(site.tensor, ""), _how_much(site, comparison.policy)
    return Story(
        headline=f"The candidate goes wrong at {place(site)}",
        detail=f"{_before(comparison, site)} {_capital(how)}.",
        where=_capital(place(site)) + (f": {what}." if what else "."),
        size=_size(site, comparison.policy),
        spread=_spread(comparison),
    )


def _passed(comparison: Comparison) -> Story:
    sites = comparison.sites
    if all(site.bit_equal for site in sites):
        return Story(
            "Candidate and reference are equal to the bit", f"{counted(len(sites), 'site')} compared."
        )
    worst = worst_site(comparison)
    detail = f"All {counted(len(sites), 'site')} are within their limits."
    if worst is not None and comparison.policy.policy == "noise-floor":
        by = judged(worst, comparison.policy)
        detail += (
            f" The largest error is {times(by.ratio)} what rounding explains (limit {number(by.limit)}x), "
            f"at {worst.site}."
        )
    return Story("The candidate computes what the reference computes", detail)


def first_site(comparison: Comparison) -> SiteResult | None:
    """The site of the first divergence, or None."""
    first = comparison.first_divergence
    return next((s for s in comparison.sites if first is not None and s.site == first.site), None)


def worst_site(comparison: Comparison) -> SiteResult | None:
    """The site of the largest ratio judged, or None where no ratio is known."""
    rated = [(judged(s, comparison.policy).ratio, s) for s in comparison.sites]
    known = [(r, s) for r, s in rated if r is not None and not math.isnan(r)]
    return max(known, key=lambda pair: pair[0])[1] if known else None


def place(site: SiteResult) -> str:
    """`the key of layer 3 (vision, call 2)`."""
    if site.layer is None:
        return f"the output {site.tensor}"
    extra = [site.stack] if site.stack else []
    extra += [f"call {site.call}"] if site.call != 1 else []
    tensor = _NAMES.get(site.tensor, site.tensor)
    return f"the {tensor} of layer {site.layer}" + (f" ({', '.join(extra)})" if extra else "")


def _before(comparison: Comparison, site: SiteResult) -> str:
    """What is known of all that is computed before `site`, the first that fails."""
    earlier = comparison.sites[: comparison.sites.index(site)]
    if not earlier:
        return "Nothing was compared before it."
    seen = all(s.verdict == "pass" for s in earlier)
    seen = seen and not any(u.state != "excluded" for u in comparison.unmatched)
    what = "is computed" if seen else "could be judged"
    return f"All that {what} before it is within its limits."


def _how_much(site: SiteResult, policy: Policy) -> str:
    """By how much a limit was exceeded; in full in the panel of the site."""
    by = judged(site, policy)
    nonfinite = site.cand_nonfinite > site.ref_nonfinite
    if nonfinite or exceeded_limits(site, policy) or by.ratio is None or not by.ratio > by.limit:
        return in_words(site, policy)
    precision = f" in {policy.precision}" if policy.precision else ""
    error = "the error that it adds" if by.introduced else "its error"
    limit = number(by.limit)
    return f"{error} is {many(by.ratio)} times what rounding{precision} explains; the limit is {limit}"


def _size(site: SiteResult, policy: Policy) -> str:
    if site.cand_nonfinite > site.ref_nonfinite:
        return f"{site.cand_nonfinite} of its values are NaN or infinite."
    by = judged(site, policy)
    if by.error is None or not math.isfinite(by.error):
        return ""
    text = f"It is off by {percent(by.error)} of its size"
    if by.floor:
        precision = policy.precision or "the candidate's precision"
        text += f", where rounding in {precision} explains {percent(by.floor)}"
    return text + "."


def _spread(comparison: Comparison) -> str:
    failing = sum(s.verdict == "fail" for s in comparison.sites) - 1
    carried = sum(propagated(s, comparison.policy) for s in comparison.sites)
    parts = [f"{counted(failing, 'more site')} {'fails' if failing == 1 else 'fail'}"] if failing > 0 else []
    parts += (
        [f"{counted(carried, 'site')} only {'passes' if carried == 1 else 'pass'} on what came in"]
        if carried
        else []
    )
    return _capital(", ".join(parts)) + "." if parts else ""


def propagated(site: SiteResult, policy: Policy) -> bool:
    """Whether `site` passes although its cumulative error is over the limit: none of it is its own."""
    return (
        site.verdict == "pass"
        and site.introduced_ratio is not None
        and site.ratio is not None
        and site.ratio > judged(site, policy).limit
    )


def explained(share: float | None) -> str:
    """What an explained share means, or ""."""
    if share is None or not math.isfinite(share):
        return ""
    return f"Putting this fault alone into the reference reproduces {part(share)} of the error."


def part(explained: float) -> str:
    """How much of an error an emulation explains: `97 %`, or `none` where it makes it larger."""
    return f"{number(100 * explained)} %" if explained >= 0 else "none"


def percent(share: float) -> str:
    """`2.7 %`, `2e-5 %`, `211 %`."""
    return f"{number(100 * share, 2) if share < 1 else many(100 * share)} %"


def many(ratio: float) -> str:
    """A ratio as one says it, to two or three digits: `5.8`, `211`, `77 000`."""
    if not math.isfinite(ratio) or ratio < 100 or ratio >= 1e9:
        return number(ratio, 2)
    digits = 3 if ratio < 1000 else 2
    return f"{float(f'{ratio:.{digits}g}'):,.0f}".replace(",", "\u202f")


def judged_by(policy: Policy) -> str:
    """What the verdict rests on, in a sentence."""
    if policy.policy == "absolute":
        return "absolute limits"
    what = (
        "the error that each layer itself adds"
        if policy.judged == "introduced"
        else "the error accumulated up to each site"
    )
    return f"{what}, at most {number(policy.ratio)}x its noise floor"


def limits(policy: Policy) -> list[str]:
    """The limits by site pattern: `layers.*.key: cosine at least 0.999, mse at most 1e-5`."""

    def one(name: str, value: float) -> str:
        higher = name in METRICS and METRICS[name].better == "higher"
        return f"{name} at {'least' if higher else 'most'} {number(value)}"

    return [f"{p}: {', '.join(one(n, v) for n, v in given.items())}" for p, given in policy.sites.items()]


def tally(sites: Sequence[SiteResult]) -> dict[str, int]:
    """Numbers of sites by verdict."""
    return {verdict: sum(s.verdict == verdict for s in sites) for verdict in ("pass", "fail", "error")}


def error_of(site: SiteResult, policy: Policy) -> str:
    """The error judged, as a table shows it: `2.7e-2`, `NaN/Inf`, `equal`."""
    if site.cand_nonfinite > site.ref_nonfinite:
        return "NaN/Inf"
    return "equal" if site.bit_equal else figure(judged(site, policy).error)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
