"""What `divergence diff` prints."""

from __future__ import annotations

from rich.text import Text

from divergence.diff import Change, Kind, ReportDiff
from divergence.reports import counted, number, times
from divergence.reports.page import Page

_STYLES = {
    "regressed": "bold red",
    "improved": "bold green",
    "unchanged": "bold green",
    "error": "bold yellow",
}
_TITLES: dict[Kind, str] = {
    "worse": "Worse",
    "better": "Better",
    "added": "Only in the new report",
    "removed": "Only in the old report",
}
_NAMED = 20


def render_difference(
    difference: ReportDiff,
    *,
    width: int = 100,
    color: bool = False,
    ascii: bool = False,  # noqa: A002 (the flag's name)
) -> str:
    """The difference as text, without a newline at its end; arguments as of `terminal.render`."""
    page = Page(width=width, color=color, ascii_only=ascii)
    lead = Text(difference.verdict.upper(), _STYLES[difference.verdict]) + Text("  ")
    page.text(difference.reason, "bold", indent=lead.cell_len, lead=lead)
    page.styled(Text(""))
    page.pairs(
        [
            ("sites", _tally(difference)),
            ("noise", f"up to {number(difference.factor)}x, and all below the floor"),
        ]
    )
    for kind, title in _TITLES.items():
        changes = sorted(difference.of(kind), key=_size, reverse=True)
        if changes:
            page.section(title, "error over noise floor, old and new" if kind in ("worse", "better") else "")
            page.pairs((change.site, _line(change)) for change in changes[:_NAMED])
            if len(changes) > _NAMED:
                page.labelled(page.glyphs.ellipsis, f"{counted(len(changes) - _NAMED, 'more site')}")
    crossed = [c for c in difference.of("same") if c.reason != "within noise"]
    if crossed or difference.notes:
        page.section("Notes")
        for note in difference.notes:
            page.labelled("-", note)
        for change in crossed[:_NAMED]:
            page.labelled("-", f"{change.site}: {change.reason}")
    return str(page)


def _tally(difference: ReportDiff) -> str:
    kinds: tuple[Kind, ...] = ("worse", "better", "same", "added", "removed")
    return ", ".join(f"{n} {kind}" for kind in kinds if (n := len(difference.of(kind))))


def _size(change: Change) -> float:
    """Greatest change first, whichever way it went; what has no figure comes before all."""
    if change.change is None or change.change <= 0:
        return float("inf")
    return max(change.change, 1 / change.change)


def _line(change: Change) -> str:
    if change.change is None:
        return change.reason
    return f"{times(change.old)} to {times(change.new)}: {change.reason}"
