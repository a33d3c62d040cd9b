"""Reports: one renderer a file, each a pure function of a `Comparison`.

Here is what they share: how figures are written, and what is said of a site in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from divergence import verdict
from divergence.errors import counted as counted
from divergence.limits import limits_at
from divergence.result import METRICS, Comparison, Policy, SiteResult
from divergence.sites import Site
from divergence.working import file_name

if TYPE_CHECKING:
    from divergence.chain_result import Chain
    from divergence.pairs_result import Pairs


Part = Callable[[], object]
"""Some of the reports of a result; it can be sent to another process."""


def write_all(result: Comparison | Chain | Pairs, out: Path, *, link: str = "") -> list[Path]:
    """Writes every report of `result` into the folder `out`: `report.json`, `report.html`,
    `summary.md`, `junit.xml` and `plots/`. Of a chain, `report.json` and `report.html` are all of it, and
    every candidate has a folder of its own within: `1-NAME`, `2-NAME`, ... Of pairs, `index.json`,
    `index.html`, `summary.md` and `junit.xml` are all of them, and every pair has a folder of its own.

    Args:
        result: what to report.
        out: folder; made where there is none.
        link: address of the page for the summary, where it will be published.

    Returns:
        The pages.

    Raises:
        OSError: a file cannot be written.
    """
    for part in parts_of(result, out, link=link):
        part()
    return pages_of(result, out)


def pages_of(result: Comparison | Chain | Pairs, out: Path) -> list[Path]:
    """The pages that `write_all` writes, what is over all first; those of pairs are found from theirs."""
    from divergence.pairs_result import Pairs

    if isinstance(result, Pairs):
        return [out / "index.html"]
    own = (
        [] if isinstance(result, Comparison) else [folder / "report.html" for folder in _folders(result, out)]
    )
    return [out / "report.html", *own]


def parts_of(result: Comparison | Chain | Pairs, out: Path, *, link: str = "") -> list[Part]:
    """What `write_all` does, in parts that may run in any order and side by side; arguments as there."""
    from divergence.pairs_result import Pairs

    if isinstance(result, Comparison):
        return [partial(_write_texts, result, out, link), partial(_draw, result, out / "plots")]
    if isinstance(result, Pairs):
        own = [part for pair in result.pairs for part in parts_of(pair.comparison, out / pair.folder)]
        return [*own, partial(write_over_pairs, result, out, link=link)]
    each = zip(result.comparisons, _folders(result, out), strict=True)
    own = [part for comparison, folder in each for part in parts_of(comparison, folder, link=link)]
    return [partial(_write_chain, result, out), *own]


def _folders(chain: Chain, out: Path) -> list[Path]:
    return [out / f"{i}-{file_name(name)}" for i, name in enumerate(chain.names, 1)]


def _write_chain(chain: Chain, out: Path) -> None:
    from divergence.reports.html import render_chain_html

    chain.save(out / "report.json")
    (out / "report.html").write_text(render_chain_html(chain), encoding="utf-8")


def _write_texts(comparison: Comparison, out: Path, link: str) -> None:
    # Matplotlib and the templates take a second to load: only who writes a page pays.
    from divergence.reports.html import render_html
    from divergence.reports.junit import render_junit
    from divergence.reports.markdown import render_markdown

    comparison.save(out / "report.json")
    (out / "report.html").write_text(render_html(comparison), encoding="utf-8")
    (out / "summary.md").write_text(render_markdown(comparison, link), encoding="utf-8")
    (out / "junit.xml").write_text(render_junit(comparison), encoding="utf-8")


def _draw(comparison: Comparison, folder: Path) -> None:
    from divergence.reports.plots import write_plots

    write_plots(comparison, folder)


def write_over_pairs(pairs: Pairs, out: Path, *, link: str = "") -> list[Path]:
    """Writes what is over all pairs into `out`, and not their own reports; arguments as of `write_all`."""
    from divergence.reports.index import write_pairs_index
    from divergence.reports.junit import render_pairs_junit
    from divergence.reports.pairs import render_pairs_markdown

    out.mkdir(parents=True, exist_ok=True)
    for name in ("report.json", "report.html"):
        # Of a comparison that was written here before: what DIR is the report of must be one thing.
        (out / name).unlink(missing_ok=True)
    (out / "summary.md").write_text(render_pairs_markdown(pairs, link), encoding="utf-8")
    (out / "junit.xml").write_text(render_pairs_junit(pairs), encoding="utf-8")
    return [write_pairs_index(pairs, out)]


def plain(text: object, *, ascii_only: bool = False) -> str:
    r"""`text` on one line and harmless to a terminal: control characters and, with `ascii_only`,
    everything beyond ASCII are written as escapes (`\x1b`)."""
    written = "".join(
        " " if c.isspace() else c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in str(text)
    )
    return written.encode("ascii", "backslashreplace").decode() if ascii_only else written


def figure(value: float | None, digits: int = 2) -> str:
    """An error to `digits` significant digits: `2.0e-2`; `-` for None, `NaN` and `Inf` as such."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Inf" if value > 0 else "-Inf"
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def number(value: float, digits: int = 4) -> str:
    """A value in at most `digits` significant digits, plain where it can be: `-35`, `0.047`, `1e-5`."""
    mantissa, _, exponent = f"{value:.{digits}g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def times(ratio: float | None) -> str:
    """A ratio in at most seven characters: `1.3x`, `21x`, `2e4x`; `-` for None."""
    if ratio is None or not math.isfinite(ratio):
        return figure(ratio)
    if abs(ratio) >= 9999.5:
        return f"{number(ratio, 1)}x"
    return f"{ratio:.1f}x" if ratio < 9.95 else f"{ratio:.0f}x"


def span(low: float | None, high: float | None) -> str:
    """A range of values: `[-35, 40]`; `[]` where there is none."""
    return "[]" if low is None or high is None else f"[{number(low)}, {number(high)}]"


@dataclass(frozen=True)
class Judged:
    """The figures by which a site was judged.

    Attributes:
        error: relative L2 error, introduced or cumulative; of a cumulative error the worse of
            whole tensor and median token.
        floor: its noise floor.
        ratio: error over floor.
        limit: largest ratio allowed.
        introduced: whether the error is what the layer itself adds.
    """

    error: float | None
    floor: float | None
    ratio: float | None
    limit: float
    introduced: bool


def address(site: SiteResult) -> Site:
    """The address of `site`."""
    return Site(site.layer, site.tensor, site.stack, site.call)


def judged(site: SiteResult, policy: Policy) -> Judged:
    """The figures by which `site` was judged: the introduced error where replay gave one."""
    limit = limits_at(policy.sites, address(site)).get("ratio", policy.ratio)
    if site.introduced_ratio is not None:
        return Judged(site.introduced, site.introduced_floor, site.introduced_ratio, limit, introduced=True)
    errors = [e for e in (site.rel_l2, site.row_rel_l2) if e is not None]
    worst = next((e for e in errors if math.isnan(e)), max(errors, default=None))
    return Judged(worst, site.floor, site.ratio, limit, introduced=False)


def in_words(site: SiteResult, policy: Policy) -> str:
    """What is wrong with `site` and by how much, figure against limit, in one sentence."""
    if site.cand_nonfinite > site.ref_nonfinite:
        return f"{site.cand_nonfinite} values are NaN or Inf (in the reference {site.ref_nonfinite})"
    exceeded = exceeded_limits(site, policy)
    if exceeded:
        return "; ".join(exceeded)
    by = judged(site, policy)
    if by.error is None or by.ratio is None or not by.ratio > by.limit:
        return site.reason or "within its limits"
    # The ratio is the worst of whole tensor, median token and median channel; this floor is the first's.
    whole = by.error and by.floor and math.isclose(by.error / by.floor, by.ratio, rel_tol=0.05)
    floor = f"floor of {figure(by.floor)}" if whole else "floor at the median token or channel"
    limit = f"{number(by.ratio, 3)}x {{}} noise {floor} (limit {number(by.limit)}x)"
    if by.introduced:
        return f"introduces an error of {figure(by.error)}, {limit.format('its own')}"
    return f"error {figure(by.error)} is {limit.format('the')}"


def exceeded_limits(site: SiteResult, policy: Policy) -> list[str]:
    """The absolute limits that `site` exceeds: `mse 3.1e-3 is above the limit 1e-5`."""
    found = limits_at(policy.sites, address(site))
    limits = {metric: limit for metric, limit in found.items() if metric in METRICS and metric != "ratio"}
    figures = {metric: getattr(site, metric) for metric in limits}
    return [
        # Six digits: a cosine of 0.99897 must not read as the 0.999 that it misses.
        f"{e.metric} {number(e.value, 6)} is {e.side} the limit {number(e.limit)}"
        for e in verdict.exceeded_limits(figures, limits)
    ]
