"""The terminal report of a chain: which step brought an error in, and every candidate beside the others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.cells import set_cell_size
from rich.text import Text

from divergence.chain_result import Chain, Difference, Step
from divergence.reports import counted, figure, judged, number, times
from divergence.reports.chart import Scale, bar
from divergence.reports.layers import Fold, Row, grouped
from divergence.reports.page import Page
from divergence.reports.table import CELL, GAP, MAIN, MARK_STYLES, cell
from divergence.reports.terminal import WORDS, headline
from divergence.result import Comparison, Policy, SiteResult
from divergence.sites import LAYER_TENSORS

_LAYER = 7
_MIN_BAR, _MAX_BAR = 10, 28
_NAME, _FIRST = 22, 26


def render_chain(chain: Chain, *, width: int = 100, color: bool = False, ascii: bool = False) -> str:  # noqa: A002 (the flag's name)
    """The report as text, without a newline at its end.

    Args:
        chain: what to show.
        width: widest line, in character cells; at least 40 are used.
        color: with ANSI colours; without, the text holds no escape sequence.
        ascii: with ASCII characters only.
    """
    page = Page(width=width, color=color, ascii_only=ascii)
    headline(page, chain.verdict, chain.reason)
    _steps(page, chain.steps)
    _candidates(page, chain)
    shown = {n: c for n, c in zip(chain.names, chain.comparisons, strict=True) if c.sites}
    if shown:
        _sites(page, chain, shown)
        _accumulation(page, shown)
    _remarks(page, chain)
    if chain.environment or chain.command:
        page.section("Run")
        seconds = chain.environment.get("seconds")
        page.pairs([("seconds", seconds and number(seconds)), ("command", chain.command)])
    return str(page)


def _steps(page: Page, steps: Sequence[Step]) -> None:
    page.section("Steps", "each candidate against the one before it")
    arrow = " -> "
    for step in steps:
        mark = page.glyphs.marks[step.verdict]
        style = "" if step.verdict == "pass" else MARK_STYLES[step.verdict]
        page.labelled(f"{mark} {step.from_}{arrow}{step.to}", step.sentence, style=style)


def _candidates(page: Page, chain: Chain) -> None:
    """Accuracy and, where it is known, latency of every candidate."""
    latencies = [latency_of(c, "candidate") for c in chain.comparisons]
    reference = next((ms for c in chain.comparisons if (ms := latency_of(c, "reference")) is not None), None)
    timed = reference is not None or any(ms is not None for ms in latencies)
    page.section("Candidates", "each against the reference")
    widths: tuple[int, ...] = (_NAME, 9, 11, _FIRST, 9, 9, *((9,) if timed else ()))
    heads = ("candidate", "verdict", "precision", "first divergence", "error", "ratio")
    rows: list[tuple[Sequence[str], str]] = [((*heads, *(("ms",) if timed else ())), "bold")]
    if timed:
        blank = ("-",) * (len(heads) - 1)
        rows.append((("reference", *blank, _milliseconds(reference)), ""))
    for name, comparison, ms in zip(chain.names, chain.comparisons, latencies, strict=True):
        cells = (
            name,
            WORDS[comparison.verdict],
            comparison.policy.precision or "-",
            comparison.first_divergence.site if comparison.first_divergence else "-",
            *worst_figures(comparison),
        )
        style = "" if comparison.verdict == "pass" else MARK_STYLES[comparison.verdict]
        rows.append(((*cells, *((_milliseconds(ms),) if timed else ())), style))
    for line, style in rows:
        write_row(page, line, widths, style)


def write_row(page: Page, cells: Sequence[str], widths: Sequence[int], style: str) -> None:
    """Writes cells in columns, the first to the left, as far as the page is wide."""
    line = Text("  ")
    for text, width in zip(cells, widths, strict=True):
        if line.cell_len + width > page.width:
            break
        line.append(set_cell_size(_cut(page, text, width - 1), width), style)
    page.styled(line)


def _cut(page: Page, text: str, width: int) -> str:
    """`text` in at most `width` cells, its end kept: what tells names apart stands there."""
    shown = page.plain(text)
    if len(shown) <= width:
        return shown
    dots = page.glyphs.ellipsis
    return dots + shown[len(shown) - width + len(dots) :]


def worst_figures(comparison: Comparison) -> tuple[str, str]:
    """The largest error of any site by its floor, and that ratio."""
    site = _worst(comparison.sites, comparison.policy)
    return cell(site, comparison.policy) if site is not None else ("-", "")


def latency_of(comparison: Comparison, side: str) -> float | None:
    """Milliseconds that the `reference` or the `candidate` took, where its run told."""
    facts = comparison.environment.get(side)
    value: Any = facts.get("latency_ms") if isinstance(facts, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else number(value, 3)


def _sites(page: Page, chain: Chain, shown: Mapping[str, Comparison]) -> None:
    """The telling sites, in a column for every candidate: against the reference, then against the one
    before."""
    sites = list(telling_sites(shown))
    page.section(
        "Sites", "error and its ratio to the noise floor; first divergences, and the worst of every tensor"
    )
    against = {
        name: {site.site: (*cell(site, c.policy), site.verdict) for site in c.sites}
        for name, c in shown.items()
    }
    _columns(page, sites, against)
    # The first step is the first candidate against the reference, which stands above.
    steps = {
        step.to: {d.site: (*_difference(d), "") for d in step.differences}
        for step in chain.steps
        if step.from_ in shown and step.differences
    }
    if steps:
        page.section("Differences", "the same sites, each candidate against the one before it")
        _columns(page, sites, steps)


def _difference(difference: Difference) -> tuple[str, str]:
    if difference.bit_equal:
        return "equal", ""
    errors = [e for e in (difference.rel_l2, difference.row_rel_l2) if e is not None]
    return figure(max(errors, default=None)), times(difference.ratio) if difference.ratio is not None else ""


def _columns(
    page: Page, sites: Sequence[str], columns: Mapping[str, Mapping[str, tuple[str, str, str]]]
) -> None:
    """A row for every site, and in a column for every candidate error, ratio and mark; as many tables
    as it takes."""
    label = min(max(map(len, sites), default=0) + 3, page.width - GAP - CELL)
    fitting = (page.width - label) // (GAP + CELL)
    names = list(columns)
    for start in range(0, len(names), fitting):
        part = names[start : start + fitting]
        if start:
            page.styled(Text(""))
        header = Text("  " + "site".ljust(label - 2), "bold")
        for name in part:
            header.append(" " * GAP + set_cell_size(_cut(page, name, CELL).center(CELL), CELL), "bold")
        page.styled(header)
        for site in sites:
            line = Text(set_cell_size("  " + _cut(page, site, label - 3), label))
            for name in part:
                _append(page, line, columns[name].get(site))
            page.styled(line)


def _append(page: Page, line: Text, figures: tuple[str, str, str] | None) -> None:
    line.append(" " * GAP)
    if figures is None:
        line.append("-".center(CELL), "dim")
        return
    error, ratio, verdict = figures
    line.append(f"{error:>7} {ratio:>7} ")
    line.append(page.glyphs.marks.get(verdict, " "), MARK_STYLES.get(verdict, ""))


def telling_sites(shown: Mapping[str, Comparison]) -> Iterator[str]:
    """Names of the sites worth a row: the first divergence of every candidate, then of every tensor the
    site at which any candidate is worst."""
    firsts = [c.first_divergence.site for c in shown.values() if c.first_divergence is not None]
    found = dict.fromkeys(firsts)
    tensors: dict[str, None] = {}
    for comparison in shown.values():
        tensors.update(dict.fromkeys(_tensor(site) for site in comparison.sites))
    for tensor in sorted(tensors, key=_rank):
        worst: tuple[tuple[bool, float], str] | None = None
        for comparison in shown.values():
            site = _worst((s for s in comparison.sites if _tensor(s) == tensor), comparison.policy)
            if site is not None:
                candidate = (_badness(site, comparison.policy), site.site)
                worst = candidate if worst is None or candidate[0] > worst[0] else worst
        if worst is not None:
            found.setdefault(worst[1])
    yield from found


def _tensor(site: SiteResult) -> str:
    return site.tensor if site.layer is not None else site.site


def _rank(tensor: str) -> tuple[int, str]:
    return (LAYER_TENSORS.index(tensor) if tensor in LAYER_TENSORS else len(LAYER_TENSORS), tensor)


def _worst(sites: Iterable[SiteResult], policy: Policy) -> SiteResult | None:
    return max(sites, key=lambda site: _badness(site, policy), default=None)


def _badness(site: SiteResult, policy: Policy) -> tuple[bool, float]:
    """Orders sites by how far they are from passing: NaN and Inf above all, then by ratio or error."""
    if site.cand_nonfinite > site.ref_nonfinite:
        return (True, math.inf)
    by = judged(site, policy)
    value = by.ratio if by.ratio is not None else by.error
    return (site.verdict != "pass", 0.0 if value is None or math.isnan(value) else value)


def _accumulation(page: Page, shown: Mapping[str, Comparison]) -> None:
    """The accumulated error over the layers, a series of bars for every candidate."""
    present = {s.tensor for c in shown.values() for s in c.sites if s.layer is not None}
    tensor = next((t for t in ("hidden", *MAIN, *sorted(present)) if t in present), None)
    if tensor is None:
        return
    rows = chain_rows(shown, tensor)
    charted = [site for row in rows for site in row.sites.values()]
    scale = Scale.over(value for site in charted for value in (site.rel_l2, site.floor))
    if scale is None:
        return
    low, high = scale.ends
    tick = page.glyphs.tick
    page.section(
        "Accumulation", f"error of {tensor} by layer, {low} to {high} logarithmic; {tick} its noise floor"
    )
    columns = max(1, (page.width - _LAYER) // (GAP + _MIN_BAR))
    names = list(shown)
    for start in range(0, len(names), columns):
        part = names[start : start + columns]
        if start:
            page.styled(Text(""))
        _plot(page, rows, part, scale, shown[names[0]].policy)


def chain_rows(shown: Mapping[str, Comparison], tensor: str) -> list[Row]:
    """A row for every call of every layer; its sites are by candidate, all of one tensor."""
    rows: dict[tuple[int, str, int], Row] = {}
    for name, comparison in shown.items():
        for site in comparison.sites:
            if site.layer is not None and site.tensor == tensor:
                key = (site.call, site.stack, site.layer)
                rows.setdefault(key, Row(site.stack, site.call, site.layer, {})).sites[name] = site
    return list(rows.values())


def _plot(page: Page, rows: Sequence[Row], names: Sequence[str], scale: Scale, policy: Policy) -> None:
    cells = min(_MAX_BAR, (page.width - _LAYER) // len(names) - GAP)
    header = Text("layer".rjust(_LAYER), "bold")
    for name in names:
        header.append(" " * GAP + set_cell_size(_cut(page, name, cells), cells), "bold")
    page.styled(header)
    groups = grouped(rows)
    for group in groups:
        if len(groups) > 1 or group.stack:
            page.text(group.title, "bold", indent=2, lead=Text("  "))
        for row in group.rows:
            if isinstance(row, Fold):
                page.text(f"{page.glyphs.ellipsis} {row.in_words(policy)}", "dim", indent=_LAYER)
                continue
            line = Text(str(row.layer).rjust(_LAYER))
            for name in names:
                line.append(" " * GAP)
                _draw(page, line, row.sites.get(name), scale, cells)
            page.styled(line)


def _draw(page: Page, line: Text, site: SiteResult | None, scale: Scale, cells: int) -> None:
    if site is None:
        line.append("-".ljust(cells), "dim")
        return
    if site.bit_equal:
        line.append("equal".ljust(cells), "dim")
        return
    value = math.nan if site.cand_nonfinite > site.ref_nonfinite else site.rel_l2
    drawn = bar(value, site.floor, scale, cells, page.glyphs)
    line.append(set_cell_size(drawn, cells), "cyan" if site.verdict == "pass" else MARK_STYLES[site.verdict])


def _remarks(page: Page, chain: Chain) -> None:
    """Sites that were not compared, and the notes of every candidate."""
    by_text: dict[str, list[str]] = {}
    for name, comparison in zip(chain.names, chain.comparisons, strict=True):
        texts = [*comparison.notes]
        missing = [u for u in comparison.unmatched if u.state not in ("excluded", "matched")]
        if missing:
            first = f"the first {missing[0].site} ({missing[0].state})"
            texts.append(f"{counted(len(missing), 'site')} not compared, {first}")
        for text in texts:
            by_text.setdefault(text, []).append(name)
    if by_text:
        page.section("Notes")
        for text, names in by_text.items():
            which = "" if len(names) == len(chain.names) else f"{', '.join(names)}: "
            page.labelled("-", f"{which}{text}")
