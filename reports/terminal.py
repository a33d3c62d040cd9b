"""The terminal report: verdict first, then where, why, and every layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.text import Text

from divergence.probes import Description
from divergence.reports import counted, exceeded_limits, figure, in_words, judged, number, plain, span, times
from divergence.reports.chart import profile
from divergence.reports.layers import range_remarks
from divergence.reports.page import Page
from divergence.reports.table import write_layers
from divergence.reports.words import part
from divergence.result import METRICS, Comparison, Policy, SiteResult, Unmatched

STYLES = {"pass": "bold green", "fail": "bold red", "error": "bold yellow"}
WORDS = {"pass": "PASS", "fail": "FAIL", "error": "ERROR"}

# More names than this are given by their number; report.json has them all.
_NAMED = 20


def render(comparison: Comparison, *, width: int = 100, color: bool = False, ascii: bool = False) -> str:  # noqa: A002 (the flag's name)
    """The report as text, without a newline at its end.

    Args:
        comparison: what to show.
        width: widest line, in character cells; at least 40 are used.
        color: with ANSI colours; without, the text holds no escape sequence.
        ascii: with ASCII characters only.
    """
    page = Page(width=width, color=color, ascii_only=ascii)
    _verdict(page, comparison)
    _first_divergence(page, comparison)
    _causes(page, comparison)
    write_layers(page, comparison)
    _reasons(page, comparison)
    _outputs(page, comparison)
    _remarks(page, comparison)
    _unmatched(page, comparison.unmatched)
    _contract(page, comparison.contract)
    if comparison.notes:
        page.section("Notes")
        for note in comparison.notes:
            page.labelled("-", note)
    if comparison.environment or comparison.command:
        page.section("Run")
        page.pairs([("environment", _inline(comparison.environment)), ("command", comparison.command)])
    return str(page)


def render_description(
    description: Description,
    *,
    width: int = 100,
    color: bool = False,
    ascii: bool = False,  # noqa: A002 (as above)
) -> str:
    """What `divergence inspect` prints of a source; arguments as of `render`."""
    page = Page(width=width, color=color, ascii_only=ascii)
    page.text(description.source, "bold")
    page.pairs(
        [("kind", description.kind), ("precision", description.precision or "not shown by the source")]
    )
    if description.inputs:
        page.section("Inputs")
        page.pairs(description.inputs.items())
    if description.sites:
        page.section("Sites", f"{len(description.sites)}, and how each was found")
        page.pairs(
            (str(info.site), "  ".join(filter(None, (_type_of(info.dtype, info.shape), info.found))))
            for info in description.sites
        )
    else:
        page.section("Sites", "none were found")
    if description.operators:
        page.section("Operators", "how many of each type run in which dtype")
        page.pairs(
            (operator, ", ".join(f"{n} in {dtype}" for dtype, n in by_dtype.items()) or "-")
            for operator, by_dtype in sorted(description.operators.items())
        )
    _contract(page, description.contract)
    if description.notes:
        page.section("Notes")
        for note in description.notes:
            page.labelled("-", note)
    return str(page)


def _contract(page: Page, contract: Mapping[str, Any]) -> None:
    if all("precision" in row for row in contract.get("rows") or [{}]):
        from divergence.reports.contract import write_contract

        write_contract(page, contract)
    elif contract:
        page.section("Contract between host and engine")
        page.pairs((str(name), _inline(value)) for name, value in contract.items())


def render_error(message: str, *, color: bool = False, ascii: bool = False) -> str:  # noqa: A002 (as above)
    """An error message as one line, however long, so that paths in it can be copied whole."""
    line = f"{WORDS['error']}  {plain(message, ascii_only=ascii)}"
    return line if not color else f"\x1b[1;33m{WORDS['error']}\x1b[0m{line.removeprefix(WORDS['error'])}"


def headline(page: Page, verdict: str, reason: str) -> None:
    """The verdict in a word, and why."""
    lead = Text(WORDS[verdict], STYLES[verdict]) + Text("  ")
    page.text(reason, "bold", indent=lead.cell_len, lead=lead)


def _verdict(page: Page, comparison: Comparison) -> None:
    headline(page, comparison.verdict, comparison.reason or _default_reason(comparison))
    page.styled(Text(""))
    policy = comparison.policy
    page.pairs(
        [
            ("reference", comparison.reference),
            ("candidate", comparison.candidate),
            ("judged by", _judged_by(policy)),
            ("precision", _precision(policy)),
            ("noise floor", policy.floor_from),
            ("limits", _limits(policy)),
            ("sites", _tally(comparison)),
        ]
    )


def _default_reason(comparison: Comparison) -> str:
    if not comparison.sites:
        return "no site could be compared"
    return {
        "pass": "every site is within its limits",
        "fail": "the candidate differs from the reference",
        "error": "the comparison could not be judged",
    }[comparison.verdict]


def _judged_by(policy: Policy) -> str:
    if policy.policy == "absolute":
        return "absolute limits"
    what = {
        "introduced": "the error that each layer itself adds (introduced)",
        "cumulative": "the error accumulated up to each site (cumulative)",
    }[policy.judged]
    return f"{what}, at most {number(policy.ratio)}x the noise floor"


def _precision(policy: Policy) -> str:
    return " ".join(filter(None, (policy.precision, policy.precision_from and f"({policy.precision_from})")))


def _limits(policy: Policy) -> str:
    def limit(name: str, value: float) -> str:
        info = METRICS.get(name)
        return f"{name} {'>=' if info is not None and info.better == 'higher' else '<='} {number(value)}"

    return "; ".join(
        f"{pattern}: {', '.join(limit(name, value) for name, value in limits.items())}"
        for pattern, limits in policy.sites.items()
    )


def _tally(comparison: Comparison) -> str:
    sites = comparison.sites
    if not sites:
        return "none compared"
    equal = sum(site.bit_equal for site in sites)
    if equal == len(sites):
        return f"all {counted(equal, 'site')} equal to the bit"
    parts = [f"{counted(len(sites), 'site')} compared"]
    for verdict, words in (("fail", "over the limit"), ("error", "not judged")):
        if number := sum(site.verdict == verdict for site in sites):
            parts.append(f"{number} {words}")
    if equal:
        parts.append(f"{equal} equal to the bit")
    if missing := sum(u.state not in ("excluded", "matched") for u in comparison.unmatched):
        parts.append(f"{missing} unmatched")
    return ", ".join(parts)


def _first_divergence(page: Page, comparison: Comparison) -> None:
    first = comparison.first_divergence
    if first is None:
        return
    page.section("First divergence", "the first failing site in execution order")
    site = next((s for s in comparison.sites if s.site == first.site), None)
    if site is None:
        page.labelled(first.site, comparison.reason)
        return
    page.labelled(f"{site.site}:", in_words(site, comparison.policy), style="red")
    page.pairs([*_figures(page, site, comparison.policy), ("carried on", _carried_on(comparison))])


def _carried_on(comparison: Comparison) -> str:
    spread = [
        site
        for site in comparison.sites
        if site.verdict == "pass" and site.introduced_ratio is not None and _over(site, comparison.policy)
    ]
    return (
        f"by {counted(len(spread), 'site')}, over the limit through no error of their own (propagated)"
        if spread
        else ""
    )


def _over(site: SiteResult, policy: Policy) -> bool:
    return site.ratio is not None and site.ratio > judged(site, policy).limit


def _figures(page: Page, site: SiteResult, policy: Policy) -> list[tuple[str, object]]:
    at = f" at {list(site.max_abs_at)}" if site.max_abs_at is not None else ""
    by = judged(site, policy)
    reached = (
        f"error {figure(site.rel_l2)}, {times(site.ratio)} its floor of {figure(site.floor)}"
        if by.introduced
        else ""
    )
    rows: list[tuple[str, object]] = [
        ("accumulated", reached),
        ("difference", f"at most {number(site.max_abs, 3)}{at}" if site.max_abs is not None else ""),
        (
            "range",
            f"reference {span(site.ref_min, site.ref_max)}, candidate {span(site.cand_min, site.cand_max)}",
        ),
        ("cosine", number(site.cosine, 6) if site.cosine is not None else ""),
    ]
    tokens = site.profile.token
    if len(tokens) > 1:
        ends = f" {figure(tokens[0])} at the first, {figure(tokens[-1])} at the last"
        rows.append(("by token", profile(tokens, page.glyphs) + ends))
    rows.append(("dtypes", " against ".join(filter(None, (site.ref_dtype, site.cand_dtype)))))
    rows.append(("layout", site.layout))
    rows.append(("found", "; ".join(filter(None, (site.found_ref, site.found_cand)))))
    return rows


def _causes(page: Page, comparison: Comparison) -> None:
    if not comparison.causes:
        return
    page.section("Causes", "best explanation first")
    where = comparison.first_divergence.site if comparison.first_divergence else "the first divergence"
    for i, cause in enumerate(comparison.causes, 1):
        share = (
            f" (explains {part(cause.explained)} of the error at {cause.site or where})"
            if cause.explained is not None
            else f" ({cause.site})"
            if cause.site
            else ""
        )
        page.labelled(f"{i}.", f"{cause.title}{share}")
        labels = ["   evidence"] + [""] * len(cause.evidence)
        page.pairs([*zip(labels, cause.evidence, strict=False), ("   fix", cause.fix)])


def _reasons(page: Page, comparison: Comparison) -> None:
    """What the table of layers cannot show: limits other than the floor's, and why a site has no verdict."""
    first = comparison.first_divergence
    layers = [s for s in comparison.sites if s.layer is not None and not (first and s.site == first.site)]
    failing = [
        (s.site, in_words(s, comparison.policy))
        for s in layers
        if s.verdict == "fail" and _beyond_the_floor(s, comparison.policy)
    ]
    broken = [(s.site, s.reason or "no reason given") for s in layers if s.verdict == "error"]
    for title, rows in (("More failing sites", failing), ("Not judged", broken)):
        if rows:
            page.section(title)
            page.pairs(rows[:_NAMED])
            _more(page, len(rows) - _NAMED, "sites")


def _beyond_the_floor(site: SiteResult, policy: Policy) -> str:
    """What is wrong with `site` beside its ratio to the floor, or ""."""
    if site.verdict == "error":
        return site.reason
    other = site.verdict == "fail" and (_nonfinite(site) or exceeded_limits(site, policy))
    return in_words(site, policy) if other else ""


def _nonfinite(site: SiteResult) -> bool:
    return site.cand_nonfinite > site.ref_nonfinite


def _outputs(page: Page, comparison: Comparison) -> None:
    outputs = [site for site in comparison.sites if site.layer is None]
    if not outputs:
        return
    page.section("Outputs of the model")
    rows = []
    for site in outputs:
        by = judged(site, comparison.policy)
        error = f"{'adds' if by.introduced else 'error'} {figure(by.error)}"
        if site.bit_equal:
            error = "equal to the bit"
        parts = [
            f"{page.glyphs.marks[site.verdict]} {error}",
            f"{times(by.ratio)} the floor" if by.ratio is not None and not site.bit_equal else "",
            f"accumulated {figure(site.rel_l2)}" if by.introduced and not site.bit_equal else "",
            f"difference at most {number(site.max_abs, 3)}" if site.max_abs is not None else "",
            _beyond_the_floor(site, comparison.policy),
        ]
        rows.append((site.site, "  ".join(filter(None, parts))))
    page.pairs(rows)


def _remarks(page: Page, comparison: Comparison) -> None:
    remarks = range_remarks(comparison.sites)
    remarks += [
        f"{s.site}: {s.reason}"
        for s in comparison.sites
        if s.verdict == "pass" and _nonfinite(s) and s.reason
    ]
    padded = [s for s in comparison.sites if s.padded_max_abs]
    if padded:
        worst = max(padded, key=lambda s: s.padded_max_abs or 0.0)
        remarks.append(
            f"padded tokens differ by up to {number(worst.padded_max_abs or 0.0, 3)} ({worst.site}); "
            "they count for nothing else"
        )
    if remarks:
        page.section("Remarks")
        for remark in remarks:
            page.labelled("-", remark)


def _unmatched(page: Page, unmatched: tuple[Unmatched, ...]) -> None:
    by_state: dict[str, list[Unmatched]] = {}
    for item in unmatched:
        by_state.setdefault(item.state, []).append(item)
    excluded = by_state.pop("excluded", [])
    if by_state:
        page.section("Unmatched", "sites that were not compared")
    for state, items in by_state.items():
        for item in items[:_NAMED]:
            text = f"{state}: {item.reason}" if item.reason else state
            page.labelled(item.site, f"{text}; {item.suggestion}" if item.suggestion else text)
        _more(page, len(items) - _NAMED, state)
    if excluded:
        page.section("Excluded", "by name, and not judged")
        by_reason: dict[str, list[str]] = {}
        for item in excluded:
            by_reason.setdefault(item.reason, []).append(item.site)
        for reason, names in by_reason.items():
            page.labelled("-", ", ".join(names[:_NAMED]) + (f" ({reason})" if reason else ""))
            _more(page, len(names) - _NAMED, "excluded")


def _more(page: Page, number: int, state: str) -> None:
    if number > 0:
        page.labelled(page.glyphs.ellipsis, f"{number} more {state}; report.json names them all")


def _type_of(dtype: str, shape: Iterable[int | str]) -> str:
    sizes = ", ".join(str(size) for size in shape)
    return f"{dtype}[{sizes}]" if dtype or sizes else ""


def _inline(value: Any) -> str:
    """JSON values on one line: `torch 2.9.0, reference (opset 20, ...)`."""
    if isinstance(value, Mapping):
        inner = ((name, item, _inline(item)) for name, item in value.items())
        return ", ".join(
            f"{n} ({text})" if isinstance(item, Mapping) else f"{n} {text}" for n, item, text in inner
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_inline(item) for item in value) + "]"
    return str(value)
