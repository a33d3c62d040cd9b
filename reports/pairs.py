"""Terminal report and summary of pairs: a table of candidates by samples, then what needs a reader."""

from __future__ import annotations

from collections.abc import Sequence

from divergence.pairs_result import PairResult, Pairs
from divergence.reports import counted, number
from divergence.reports.assertion import figures
from divergence.reports.chain import write_row
from divergence.reports.markdown import MARKS, address, code_span, prose
from divergence.reports.page import Page
from divergence.reports.table import MARK_STYLES
from divergence.reports.terminal import headline
from divergence.reports.words import first_site
from divergence.result import Comparison

_NAME, _CELL = 24, 19
_ROWS, _COLUMNS, _NAMED = 24, 8, 20


def render_pairs(pairs: Pairs, *, width: int = 100, color: bool = False, ascii: bool = False) -> str:  # noqa: A002 (the flag's name)
    """The report as text, without a newline at its end.

    Args:
        pairs: what to show.
        width: widest line, in character cells; at least 40 are used.
        color: with ANSI colours; without, the text holds no escape sequence.
        ascii: with ASCII characters only.
    """
    page = Page(width=width, color=color, ascii_only=ascii)
    headline(page, pairs.verdict, pairs.reason)
    page.section("Pairs", "candidates by samples; where one fails, its first divergence")
    columns = max(1, (page.width - 2 - _NAME) // _CELL)
    for start in range(0, len(pairs.samples), columns):
        _grid(page, pairs, pairs.samples[start : start + columns])
    for verdict, title in (("fail", "Failing"), ("error", "Not answered")):
        wanted = [pair for pair in pairs.pairs if pair.comparison.verdict == verdict]
        if wanted:
            page.section(title)
        for pair in wanted:
            page.labelled(f"{page.glyphs.marks[verdict]} {pair.name}", _found(pair.comparison))
    if pairs.environment or pairs.command:
        page.section("Run")
        page.pairs([("environment", _facts(pairs)), ("command", pairs.command)])
    return str(page)


def _grid(page: Page, pairs: Pairs, samples: Sequence[str]) -> None:
    widths = (_NAME, *([_CELL] * len(samples)))
    write_row(page, ("candidate", *samples), widths, "bold")
    for name in pairs.candidates:
        cells = [pairs[name, sample] for sample in samples]
        worst = next((v for v in ("error", "fail") if any(c.verdict == v for c in cells)), "pass")
        said = [f"{page.glyphs.marks[c.verdict]} {_where(c)}" for c in cells]
        write_row(page, (name, *said), widths, "" if worst == "pass" else MARK_STYLES[worst])


def _where(comparison: Comparison) -> str:
    site = first_site(comparison)
    return site.site if site is not None else comparison.verdict


def _found(comparison: Comparison) -> str:
    site = first_site(comparison)
    if comparison.verdict == "error" or site is None:
        return comparison.reason
    why = f"; cause: {comparison.causes[0].title}" if comparison.causes else ""
    return f"{site.site} {figures(comparison)}{why}"


def _facts(pairs: Pairs) -> str:
    ray = pairs.environment.get("ray")
    seconds = pairs.environment.get("seconds")
    parts = [f"{number(seconds)} s"] if isinstance(seconds, int | float) else []
    if isinstance(ray, dict):
        parts += [f"Ray: {', '.join(f'{value} {name}' for name, value in ray.items())}"]
    return "; ".join(parts)


def render_pairs_markdown(pairs: Pairs, link: str = "") -> str:
    """`summary.md` of pairs, as short as that of one: at most 60 lines.

    Args:
        pairs: what to tell.
        link: where the index can be opened; without one its file is named.
    """
    wrong = [pair for pair in pairs.pairs if pair.comparison.verdict != "pass"]
    lines = [f"### {MARKS[pairs.verdict]} divergence: {pairs.verdict}", "", f"**{prose(pairs.reason)}.**", ""]
    lines += [f"- {_line(pair)}" for pair in wrong[:_NAMED]]
    lines += [f"- and {len(wrong) - _NAMED} more"] if len(wrong) > _NAMED else []
    lines += [""] if wrong else []
    lines += _table(pairs)
    where = f"[Open the index]({address(link)})" if link else "The index is `index.html` of this run"
    command = f"; to reproduce: {code_span(pairs.command)}" if pairs.command else ""
    lines.append(f"Reference {code_span(pairs.reference)}. {where}{command}")
    return "\n".join(lines) + "\n"


def _line(pair: PairResult) -> str:
    names = f"{code_span(pair.candidate)} on {code_span(pair.sample)}"
    return f"{MARKS[pair.comparison.verdict]} {names}: {prose(_found(pair.comparison))}"


def _table(pairs: Pairs) -> list[str]:
    samples, names = pairs.samples[:_COLUMNS], pairs.candidates[:_ROWS]
    lines = [
        f"| candidate | {' | '.join(map(code_span, samples))} |",
        f"|:--|{':--|' * len(samples)}",
    ]
    for name in names:
        cells = (pairs[name, sample] for sample in samples)
        said = (MARKS[c.verdict] + (f" {code_span(_where(c))}" if c.verdict == "fail" else "") for c in cells)
        lines.append(f"| {code_span(name)} | {' | '.join(said)} |")
    left = len(pairs.pairs) - len(samples) * len(names)
    return [*lines, "", *([f"{counted(left, 'more pair')} in the index.", ""] if left else [])]
