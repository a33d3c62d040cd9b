"""The table of layers: a row for every call of every layer, with a chart of the error that
accumulates against the noise floor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.cells import set_cell_size
from rich.text import Text

from divergence.reports import figure, judged, times
from divergence.reports.chart import Scale, bar
from divergence.reports.layers import Fold, Group, Row, grouped, layer_rows
from divergence.reports.page import Page
from divergence.result import Comparison, Policy, SiteResult
from divergence.sites import LAYER_TENSORS

MAIN = ("key", "value", "hidden")
"""Tensors of the first table; others follow in tables of their own."""

GAP, CELL = 3, 17
"""Cells between columns, and of a column that holds error, ratio and mark."""

_LABEL = 7
_MIN_CHART, _MAX_CHART = 8, 28
MARK_STYLES = {"pass": "green", "fail": "bold red", "error": "bold yellow"}


@dataclass(frozen=True)
class _Chart:
    """The chart column: the cumulative error of `tensor`."""

    tensor: str
    scale: Scale
    cells: int


def write_layers(page: Page, comparison: Comparison) -> None:
    """Writes the tables of layers, or nothing where no layer was compared."""
    rows = layer_rows(comparison.sites)
    if not rows:
        return
    page.section("Layers", _legend(page, comparison))
    groups = grouped(rows)
    present = {tensor for row in rows for tensor in row.sites}
    main = [tensor for tensor in MAIN if tensor in present]
    others = sorted(present - set(main), key=_rank)
    columns = max(1, (page.width - _LABEL) // (GAP + CELL))
    tables = [*_chunks(main, columns), *_chunks(others, columns)]
    chart = _chart(page.width, rows, main or others, len(tables[0]))
    if chart is not None:
        tick = page.glyphs.tick
        page.text(
            f"bars: accumulated error of {chart.tensor}, logarithmic; {tick} its noise floor", "dim", indent=2
        )
    for i, tensors in enumerate(tables):
        if i > 0:
            chart = None
            page.styled(Text(""))
        _write_table(page, groups, tensors, comparison.policy, chart)


def _rank(tensor: str) -> tuple[int, str]:
    return (LAYER_TENSORS.index(tensor) if tensor in LAYER_TENSORS else len(LAYER_TENSORS), tensor)


def _chunks(names: Sequence[str], size: int) -> list[list[str]]:
    return [list(names[i : i + size]) for i in range(0, len(names), size)]


def _legend(page: Page, comparison: Comparison) -> str:
    marks = page.glyphs.marks
    error = "relative L2 error"
    if comparison.policy.judged == "introduced":
        error += " that the layer adds"
    words = f"{error} and its ratio to the noise floor" if _has_ratios(comparison.sites) else error
    return f"{words}; {marks['pass']} within the limit, {marks['fail']} over it, {marks['error']} not judged"


def _has_ratios(sites: Iterable[SiteResult]) -> bool:
    return any(site.ratio is not None or site.introduced_ratio is not None for site in sites)


def _chart(width: int, rows: Sequence[Row], tensors: Sequence[str], columns: int) -> _Chart | None:
    cells = min(_MAX_CHART, width - _LABEL - (columns + 1) * GAP - columns * CELL)
    tensor = "hidden" if "hidden" in tensors else tensors[0]
    charted = [row.sites[tensor] for row in rows if tensor in row.sites]
    scale = Scale.over(value for site in charted for value in (site.rel_l2, site.floor))
    if scale is None or cells < max(_MIN_CHART, len(" ".join(scale.ends))):
        return None
    return _Chart(tensor, scale, cells)


def _write_table(
    page: Page, groups: Sequence[Group], tensors: Sequence[str], policy: Policy, chart: _Chart | None
) -> None:
    gap = " " * GAP
    header = Text("layer".rjust(_LABEL), "bold")
    for tensor in tensors:
        header.append(gap + set_cell_size(page.plain(tensor).center(CELL), CELL), "bold")
    if chart is not None:
        low, high = chart.scale.ends
        header.append(gap + low + high.rjust(chart.cells - len(low)), "dim")
    page.styled(header)
    for group in groups:
        if len(groups) > 1 or group.stack:
            page.text(group.title, "bold", indent=2, lead=Text("  "))
        for row in group.rows:
            if isinstance(row, Fold):
                page.text(f"{page.glyphs.ellipsis} {row.in_words(policy)}", "dim", indent=_LABEL)
            else:
                page.styled(_line(page, row, tensors, policy, chart))


def _line(page: Page, row: Row, tensors: Sequence[str], policy: Policy, chart: _Chart | None) -> Text:
    line = Text(str(row.layer).rjust(_LABEL))
    for tensor in tensors:
        line.append(" " * GAP)
        site = row.sites.get(tensor)
        if site is None:
            line.append("-".center(CELL), "dim")
            continue
        error, ratio = cell(site, policy)
        line.append(f"{error:>7} {ratio:>7} ")
        line.append(page.glyphs.marks[site.verdict], MARK_STYLES[site.verdict])
    charted = row.sites.get(chart.tensor) if chart is not None else None
    if chart is not None and charted is not None:
        value = charted.rel_l2
        if charted.cand_nonfinite > charted.ref_nonfinite:
            value = float("nan")
        line.append(" " * GAP)
        drawn = bar(value, charted.floor, chart.scale, chart.cells, page.glyphs)
        line.append(drawn, "cyan" if charted.verdict == "pass" else MARK_STYLES[charted.verdict])
    return line


def cell(site: SiteResult, policy: Policy) -> tuple[str, str]:
    """Error and ratio as the table shows them, at most seven characters each."""
    if site.cand_nonfinite > site.ref_nonfinite:
        return "NaN/Inf", ""
    if site.bit_equal:
        return "equal", ""
    by = judged(site, policy)
    return figure(by.error), times(by.ratio) if by.ratio is not None else ""
