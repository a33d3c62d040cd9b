"""`divergence explain`: every cause that was tried, its evidence, and how much of the error it explains."""

from __future__ import annotations

from divergence.reports import counted
from divergence.reports.page import Page
from divergence.reports.words import part
from divergence.result import Comparison, Hypothesis


def render_explanation(
    comparison: Comparison,
    *,
    width: int = 100,
    color: bool = False,
    ascii: bool = False,  # noqa: A002 (the flag's name)
) -> str:
    """The reasoning behind the causes as text, without a newline at its end; arguments as of
    `divergence.reports.terminal.render`."""
    page = Page(width=width, color=color, ascii_only=ascii)
    page.text(comparison.reason or comparison.verdict, "bold")
    page.pairs([("reference", comparison.reference), ("candidate", comparison.candidate)])
    if not comparison.diagnosis:
        page.section("Nothing was diagnosed", _why_not(comparison))
    for site in dict.fromkeys(h.site for h in comparison.diagnosis):
        tried = [h for h in comparison.diagnosis if h.site == site]
        page.section(site, f"{counted(len(tried), 'cause')} tried, best first")
        for rank, hypothesis in enumerate(tried, 1):
            _hypothesis(page, rank, hypothesis)
    named = [c for c in comparison.causes if c.id == "unknown"]
    for cause in named:
        page.section(f"Unknown at {cause.site}", cause.title)
        for line in cause.evidence:
            page.labelled("-", line)
    return str(page)


def _why_not(comparison: Comparison) -> str:
    if comparison.verdict == "pass":
        return "the candidate passes"
    return "run compare without --no-diagnosis, with a PyTorch reference"


def _hypothesis(page: Page, rank: int, hypothesis: Hypothesis) -> None:
    page.labelled(f"{rank}.", f"{hypothesis.id}: {hypothesis.title}")
    rows = [("   explained", _share(hypothesis))]
    rows += [(label, line) for label, line in _labelled("   for", hypothesis.evidence_for)]
    rows += [(label, line) for label, line in _labelled("   against", hypothesis.evidence_against)]
    page.pairs([*rows, ("   fix", hypothesis.fix)])


def _labelled(label: str, lines: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(label if i == 0 else "", line) for i, line in enumerate(lines)]


def _share(hypothesis: Hypothesis) -> str:
    if hypothesis.explained is None:
        return "told from facts, nothing was emulated"
    share = f"{part(hypothesis.explained)} of the error at {hypothesis.site}"
    if hypothesis.overall is None:
        return share
    return f"{share}, {part(hypothesis.overall)} over the tensors of the layer"
