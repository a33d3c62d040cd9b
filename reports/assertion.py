"""The message of a failed assertion: who reads only its first three lines knows where, how much and why."""

from __future__ import annotations

from pathlib import Path

from divergence.reports import in_words, number, plain
from divergence.reports.terminal import render
from divergence.reports.words import first_site, place
from divergence.result import Comparison


def render_assertion(comparison: Comparison, page: Path | None = None) -> str:
    """The message.

    Args:
        comparison: one that fails.
        page: its report, if one was written.

    Returns:
        Layer and tensor in the first line, figure against limit in the second, cause in the third;
        then the page, and the terminal report.
    """
    lines = [where(comparison), figures(comparison), cause(comparison)]
    if page is not None:
        lines.append(f"report: {plain(page)}")
    return "\n".join([*lines, "", render(comparison)])


def where(comparison: Comparison) -> str:
    """`layers.3.key fails: layer 3, tensor key`, on one line."""
    site = first_site(comparison)
    if site is None:
        return plain(f"{comparison.candidate} could not be compared in full")
    if site.layer is None:
        return plain(f"{site.site} fails: {place(site)}")
    extra = f" of stack {site.stack}" if site.stack else ""
    extra += f", call {site.call}" if site.call != 1 else ""
    return plain(f"{site.site} fails: layer {site.layer}{extra}, tensor {site.tensor}")


def figures(comparison: Comparison) -> str:
    """What was found at the first divergence against its limit, on one line; else the reason."""
    site = first_site(comparison)
    return plain(comparison.reason if site is None else in_words(site, comparison.policy))


def cause(comparison: Comparison) -> str:
    """`cause: TITLE (explains 99 % of the error); fix: ...`, on one line."""
    if not comparison.causes:
        return "cause: none was named"
    best = comparison.causes[0]
    share = "" if best.explained is None else f" (explains {number(100 * best.explained, 3)} % of the error)"
    return plain(f"cause: {best.title}{share}" + (f"; fix: {best.fix}" if best.fix else ""))
