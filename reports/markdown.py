"""`summary.md`: a comparison for a pull-request comment or a job summary, in GitHub's Markdown.

Under 60 lines whatever the model; all that comes from it is escaped, so that a name can neither
break the table nor notify anybody.
"""

from __future__ import annotations

import html
import re

from divergence.reports import counted, judged, plain, times
from divergence.reports.layers import Fold, Row, grouped, layer_rows
from divergence.reports.words import error_of, explained, judged_by, limits, story, tally
from divergence.result import Cause, Comparison, SiteResult, Unmatched

MAX_LINES = 60
_TABLE_ROWS = 22
_NAMED = 5
_EVIDENCE = 4
MARKS = {"pass": "✅", "fail": "❌", "error": "⚠️"}
_WORDS = {"pass": "pass", "fail": "fail", "error": "error"}
_SPECIAL = re.compile(r"([\\`*_\[\]()#|~!{}])")


def render_markdown(comparison: Comparison, link: str = "") -> str:
    """The summary.

    Args:
        comparison: what to tell.
        link: where the page can be opened (an artifact's address); without one the folder is named.
    """
    told = story(comparison)
    lines = [
        f"### {MARKS[comparison.verdict]} divergence: {_WORDS[comparison.verdict]}",
        "",
        f"**{prose(told.headline)}.** {prose(told.detail)}",
        "",
    ]
    lines += _where(comparison)
    lines += _causes(comparison)
    pair = f"Reference {code_span(comparison.reference)}, candidate {code_span(comparison.candidate)}"
    lines += [f"{pair}; judged by {prose(_judged(comparison))}. {_tally(comparison)}", ""]
    lines += _unmatched(comparison.unmatched)
    lines += _table(comparison)
    lines.append(_link(comparison, link))
    return "\n".join(lines) + "\n"


def _where(comparison: Comparison) -> list[str]:
    told = story(comparison)
    if not told.where or comparison.first_divergence is None:
        return []
    said = " ".join(filter(None, (told.where, told.size, told.spread)))
    return [f"- **Where:** {code_span(comparison.first_divergence.site)}. {prose(said)}"]


def _causes(comparison: Comparison) -> list[str]:
    if comparison.verdict != "fail":
        return []
    if not comparison.causes:
        return ["- **Why:** no cause was named.", ""] if comparison.first_divergence else []
    cause = comparison.causes[0]
    lines = [f"- **Why:** {prose(cause.title)}. {prose(explained(cause.explained))}".rstrip()]
    lines += [f"  - {prose(line)}" for line in cause.evidence[:_EVIDENCE]]
    if cause.fix:
        lines.append(f"- **Fix:** {prose(cause.fix)}")
    if len(comparison.causes) > 1:
        others = ", ".join(map(_other, comparison.causes[1 : 1 + _NAMED]))
        lines.append(f"- Also: {others}")
    return [*lines, ""]


def _other(cause: Cause) -> str:
    """A further cause, with the site at which it brings its error in."""
    return prose(cause.title) + (f" at {code_span(cause.site)}" if cause.site else "")


def _judged(comparison: Comparison) -> str:
    policy = comparison.policy
    precision = f", in {policy.precision}" if policy.precision else ""
    given = f"; limits {'; '.join(limits(policy)[:_NAMED])}" if policy.sites else ""
    return f"{judged_by(policy)}{precision}{given}"


def _tally(comparison: Comparison) -> str:
    if not comparison.sites:
        return "No site was compared."
    found = tally(comparison.sites)
    parts = [f"{counted(len(comparison.sites), 'site')}: {found['pass']} pass"]
    parts += [f"{found['fail']} fail"] if found["fail"] else []
    parts += [f"{found['error']} not judged"] if found["error"] else []
    excluded = sum(u.state == "excluded" for u in comparison.unmatched)
    parts += [f"{excluded} excluded by name"] if excluded else []
    return ", ".join(parts) + "."


def _unmatched(unmatched: tuple[Unmatched, ...]) -> list[str]:
    missing = [u for u in unmatched if u.state != "excluded"]
    if not missing:
        return []
    lines = [f"- {code_span(u.site)} {u.state}: {prose(u.reason)}" for u in missing[:_NAMED]]
    if len(missing) > _NAMED:
        lines.append(f"- and {counted(len(missing) - _NAMED, 'more site')} that could not be compared")
    return [*lines, ""]


def _table(comparison: Comparison) -> list[str]:
    rows = layer_rows(comparison.sites)
    tensors = list(dict.fromkeys(t for row in rows for t in row.sites))
    if not rows:
        return _outputs([s for s in comparison.sites if s.layer is None], comparison)
    lines = [
        "<details><summary>Error over noise floor by layer</summary>",
        "",
        f"| layer | {' | '.join(code_span(t) for t in tensors)} |",
        f"|--:|{'--:|' * len(tensors)}",
    ]
    body = [_line(row, tensors, comparison) for row in _chosen(rows)]
    return [*lines, *body, "", *_folded(len(rows) - len(body)), "</details>", ""]


def _chosen(rows: list[Row]) -> list[Row]:
    """The rows with most to say, in execution order: those that do not pass first, then the ends."""
    if len(rows) <= _TABLE_ROWS:
        return rows
    kept = [row for group in grouped(rows) for row in group.rows if not isinstance(row, Fold)]
    wrong = [row for row in rows if not row.passes][:_TABLE_ROWS]
    chosen = {id(row) for row in wrong}
    for row in (*rows[:1], *rows[-1:], *kept, *rows):
        if len(chosen) >= _TABLE_ROWS:
            break
        chosen.add(id(row))
    return [row for row in rows if id(row) in chosen]


def _folded(left: int) -> list[str]:
    return [f"{counted(left, 'more layer')} in the page.", ""] if left else []


def _line(row: Row, tensors: list[str], comparison: Comparison) -> str:
    name = f"{row.stack} {row.layer}" if row.stack else str(row.layer)
    name += f"@{row.call}" if row.call != 1 else ""
    return f"| {prose(name)} | {' | '.join(_cell(row.sites.get(t), comparison) for t in tensors)} |"


def _cell(site: SiteResult | None, comparison: Comparison) -> str:
    if site is None:
        return ""
    by = judged(site, comparison.policy)
    said = error_of(site, comparison.policy)
    if by.ratio is not None and said not in ("equal", "NaN/Inf"):
        said = times(by.ratio)
    return f"**{said}** {MARKS[site.verdict]}" if site.verdict != "pass" else said


def _outputs(sites: list[SiteResult], comparison: Comparison) -> list[str]:
    lines = [f"- {code_span(s.site)} {_cell(s, comparison)}" for s in sites[:_TABLE_ROWS]]
    return [*lines, ""] if lines else []


def _link(comparison: Comparison, link: str) -> str:
    where = f"[Open the report]({address(link)})" if link else "The report is `report.html` of this run"
    command = f"; to reproduce: {code_span(comparison.command)}" if comparison.command else ""
    return f"{where}{command}"


def address(link: str) -> str:
    """`link` as it may stand in parentheses."""
    return re.sub(r"[\s()<>\\]", lambda m: f"%{ord(m[0]):02X}", link)


def code_span(text: str) -> str:
    """A code span: nothing in it is markup, nor a mention."""
    text = plain(text).strip().replace("|", "\\|") or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text[0] == "`" or text[-1] == "`" else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def prose(text: str) -> str:
    """Prose in which nothing is markup, HTML or a mention."""
    escaped = _SPECIAL.sub(r"\\\1", html.escape(plain(text), quote=False))
    return escaped.replace("@", "@\u200b")
