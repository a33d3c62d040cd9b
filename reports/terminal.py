"""The terminal report: verdict, first divergence, and a row per layer."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from divergence.probes import Description
from divergence.result import Comparison, SiteResult

_STYLE = {"pass": "green", "fail": "bold red", "error": "bold yellow"}
_MARK = {"pass": "", "fail": " FAIL", "error": " ?"}
_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "_.-:=+*#"
_FOLD_ABOVE = 40
_FOLD_EDGE = 6


def render(comparison: Comparison, *, width: int = 100, color: bool = False, ascii: bool = False) -> str:
    """The report as text.

    Args:
        comparison: what to render.
        width: columns.
        color: with escape sequences for a terminal.
        ascii: draw with ASCII characters only.
    """
    parts: list[RenderableType] = [_verdict(comparison), *_judged_by(comparison)]
    if comparison.sites:
        parts += [Text(""), _layers(comparison, ascii)]
    parts += _remarks(comparison)
    return _printed(parts, width, color)


def render_description(description: Description, *, width: int = 100, color: bool = False) -> str:
    """What `divergence inspect` shows of a source."""
    head = f"{description.source} ({description.kind}, precision {description.precision or 'unknown'})"
    sites = _table("site", "dtype", "shape", "found")
    for info in description.sites:
        sites.add_row(Text(str(info.site)), Text(info.dtype), Text(str(list(info.shape))), Text(info.found))
    parts: list[RenderableType] = [Text(head)]
    parts += [Text(f"input {name}: {what}") for name, what in description.inputs.items()]
    parts += [Text(""), sites]
    if description.operators:
        operators = _table("operator", "runs in")
        for name, counts in sorted(description.operators.items()):
            operators.add_row(Text(name), Text(", ".join(f"{n} x {dtype}" for dtype, n in counts.items())))
        parts += [Text(""), operators]
    parts += [Text(f"note: {note}") for note in description.notes]
    return _printed(parts, width, color)


def _printed(parts: Iterable[RenderableType], width: int, color: bool) -> str:
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=width,
        force_terminal=color,
        color_system="standard" if color else None,
        legacy_windows=False,
        highlight=False,
    )
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _verdict(comparison: Comparison) -> Text:
    text = Text(comparison.verdict.upper(), style=_STYLE[comparison.verdict])
    text.append(f"  {comparison.reason}", style="default")
    return text


def _judged_by(comparison: Comparison) -> list[RenderableType]:
    lines: list[RenderableType] = [Text(f"{comparison.candidate} against {comparison.reference}")]
    if comparison.first_divergence is not None:
        lines.append(Text(f"first divergence: {comparison.first_divergence.site}", style="bold"))
    for cause in comparison.causes:
        share = f" ({cause.explained:.0%} explained)" if cause.explained is not None else ""
        lines.append(Text(f"cause: {cause.title}{share}; {cause.fix}"))
    policy = comparison.policy
    if policy.floor_from:
        lines.append(
            Text(
                f"judged by: {policy.judged} error, at most {policy.ratio:g}x the noise floor of "
                f"{policy.precision} ({policy.precision_from}; floor: {policy.floor_from})"
            )
        )
    elif policy.policy == "absolute":
        lines.append(Text("judged by: absolute limits"))
    return lines


def _layers(comparison: Comparison, ascii: bool) -> Table:
    """A row per layer call: relative error and, in brackets, its ratio to the floor."""
    rows: dict[tuple[str, int | None, int, str], dict[str, SiteResult]] = {}
    for site in comparison.sites:
        name = site.tensor if site.layer is None else ""
        rows.setdefault((site.stack, site.layer, site.call, name), {})[site.tensor] = site
    tensors = [t for t in dict.fromkeys(s.tensor for s in comparison.sites if s.layer is not None)]
    bars = _bars([_growth(row) for row in rows.values()], _ASCII_BLOCKS if ascii else _BLOCKS)
    table = _table("layer", *tensors, "growth")
    for (key, row), bar, hidden in zip(rows.items(), bars, _folded(list(rows.values())), strict=True):
        if hidden is None:
            cells = [_cell(row.get(t)) for t in tensors]
            if key[1] is None:
                cells = [_cell(row[key[3]]), *[Text("")] * (len(tensors) - 1)] if tensors else []
            table.add_row(Text(_label(*key)), *cells, Text(bar))
        elif hidden:
            table.add_row(Text(hidden))
    return table


def _label(stack: str, layer: int | None, call: int, output: str) -> str:
    suffix = f"@{call}" if call != 1 else ""
    if layer is None:
        return f"output.{output}{suffix}"
    return f"{stack}.{layer}{suffix}" if stack else f"{layer}{suffix}"


def _cell(site: SiteResult | None) -> Text:
    if site is None:
        return Text("-")
    if site.bit_equal:
        return Text("equal")
    error = "-" if site.rel_l2 is None else f"{site.rel_l2:.1e}"
    ratio = site.introduced_ratio if site.introduced_ratio is not None else site.ratio
    shown = error if ratio is None else f"{error} ({ratio:.3g}x)"
    return Text(shown + _MARK[site.verdict], style="" if site.verdict == "pass" else _STYLE[site.verdict])


def _growth(row: dict[str, SiteResult]) -> float | None:
    site = row.get("hidden") or next(iter(row.values()))
    return site.rel_l2 if site.rel_l2 else None


def _bars(errors: Sequence[float | None], blocks: str) -> list[str]:
    """One block per row on a logarithmic scale from the smallest to the largest error."""
    logs = [math.log10(e) if e and math.isfinite(e) else None for e in errors]
    known = [x for x in logs if x is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    span = (high - low) or 1.0
    return ["" if x is None else blocks[0] + blocks[1] * round(12 * (x - low) / span) for x in logs]


def _folded(rows: Sequence[dict[str, SiteResult]]) -> list[str | None]:
    """For every row None to show it, "" to leave it out, or the line that stands for those left out."""
    shown: list[str | None] = [None] * len(rows)
    if len(rows) <= _FOLD_ABOVE:
        return shown
    start = None
    for i in range(_FOLD_EDGE, len(rows) - _FOLD_EDGE + 1):
        passing = i < len(rows) - _FOLD_EDGE and all(s.verdict == "pass" for s in rows[i].values())
        if passing and start is None:
            start = i
        elif not passing and start is not None:
            if i - start > 2:
                shown[start:i] = [f"... {i - start} layers pass", *[""] * (i - start - 1)]
            start = None
    return shown


def _remarks(comparison: Comparison) -> list[RenderableType]:
    lines: list[str] = []
    for site in comparison.sites:
        if site.verdict != "pass" or (site.reason and not site.bit_equal):
            lines.append(f"{site.site}: {site.reason}")
    shown = [*lines[:12], *([f"... and {len(lines) - 12} more"] if len(lines) > 12 else [])]
    for item in comparison.unmatched:
        suggestion = f"; {item.suggestion}" if item.suggestion else ""
        shown.append(f"{item.site}: {item.state}: {item.reason}{suggestion}")
    shown += [f"note: {note}" for note in comparison.notes]
    return [Text(""), *(Text(line) for line in shown)] if shown else []
