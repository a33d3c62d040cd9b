"""The layers of a comparison as rows: grouped, the passing middle of a long model folded, and
remarks on ranges gathered over runs of layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from divergence.reports import address, counted, judged, number, span, times
from divergence.result import Policy, SiteResult

FOLD_ABOVE = 40
"""Tables of more rows are folded."""

# Passing rows that stay at the ends of a group; fewer where many groups share the page.
_ENDS, _ENDS_OF_MANY, _MANY = (5, 3), (1, 1), 4
# A fold line must stand for more than it takes.
_WORTH_FOLDING = 3
# A candidate's range this many times narrower or wider than the reference's is worth a remark.
_GROSS = 2.0
_ZERO, _CONSTANT = "is all zero", "is constant"


@dataclass(frozen=True)
class Row:
    """One call of one layer; `sites` by tensor name."""

    stack: str
    call: int
    layer: int
    sites: dict[str, SiteResult]

    @property
    def passes(self) -> bool:
        """Whether every site of it passes."""
        return all(site.verdict == "pass" for site in self.sites.values())


@dataclass(frozen=True)
class Fold:
    """Consecutive passing rows that are not shown one by one."""

    rows: tuple[Row, ...]

    def in_words(self, policy: Policy) -> str:
        """What was folded: `layers 12 to 37: all pass, worst ratio 1.3x`."""
        ratios = [judged(site, policy).ratio for row in self.rows for site in row.sites.values()]
        worst = max((r for r in ratios if r is not None), default=None)
        what = f", worst ratio {times(worst)}" if worst is not None else ""
        return f"layers {self.rows[0].layer} to {self.rows[-1].layer}: all pass{what}"


@dataclass(frozen=True)
class Group:
    """The rows of one call of one stack, in execution order."""

    stack: str
    call: int
    rows: tuple[Row | Fold, ...]

    @property
    def title(self) -> str:
        """`stack vision, call 2`, leaving out what goes without saying."""
        parts = [f"stack {self.stack}" if self.stack else "", f"call {self.call}" if self.call != 1 else ""]
        return ", ".join(filter(None, parts)) or "call 1"


def layer_rows(sites: Iterable[SiteResult]) -> list[Row]:
    """The layers of `sites` in the order in which they come."""
    rows: dict[tuple[int, str, int], Row] = {}
    for site in sites:
        if site.layer is not None:
            key = (site.call, site.stack, site.layer)
            row = rows.setdefault(key, Row(site.stack, site.call, site.layer, {}))
            row.sites[site.tensor] = site
    return list(rows.values())


def grouped(rows: Sequence[Row]) -> list[Group]:
    """Rows by call and stack; in a table of more than `FOLD_ABOVE`, passing rows away from the
    ends of their group and from any row that does not pass are folded."""
    groups = [list(members) for _, members in itertools.groupby(rows, key=lambda r: (r.call, r.stack))]
    ends = _ENDS if len(groups) <= _MANY else _ENDS_OF_MANY
    folded = [_folded(group, ends) if len(rows) > FOLD_ABOVE else tuple(group) for group in groups]
    return [Group(group[0].stack, group[0].call, shown) for group, shown in zip(groups, folded, strict=True)]


def _folded(rows: list[Row], ends: tuple[int, int]) -> tuple[Row | Fold, ...]:
    kept = set(range(ends[0])) | set(range(len(rows) - ends[1], len(rows)))
    for i, row in enumerate(rows):
        if not row.passes:
            kept |= {i - 1, i, i + 1}
    shown: list[Row | Fold] = []
    for keep, indices in itertools.groupby(range(len(rows)), key=kept.__contains__):
        run = tuple(rows[i] for i in indices)
        shown += run if keep or len(run) < _WORTH_FOLDING else (Fold(run),)
    return tuple(shown)


def range_remarks(sites: Iterable[SiteResult]) -> list[str]:
    """Where the candidate's range differs grossly from the reference's, a line for every run of
    consecutive layers of which the same is true."""
    runs: dict[tuple[str, int, str, str], list[list[SiteResult]]] = {}
    for site in sites:
        if kind := _range_kind(site):
            known = runs.setdefault((site.stack, site.call, site.tensor, kind), [])
            if known and _follows(known[-1][-1], site):
                known[-1].append(site)
            else:
                known.append([site])
    return [_range_remark(key[3], run) for key, lists in runs.items() for run in lists]


def _follows(before: SiteResult, site: SiteResult) -> bool:
    return before.layer is not None and site.layer == before.layer + 1


def _range_kind(site: SiteResult) -> str:
    ends = (site.ref_min, site.ref_max, site.cand_min, site.cand_max)
    if any(e is None or not math.isfinite(e) for e in ends):
        return ""
    ref_min, ref_max, cand_min, cand_max = (float(e) for e in ends if e is not None)
    reference, candidate = ref_max - ref_min, cand_max - cand_min
    if reference <= 0:
        return ""
    if candidate <= 0:
        return _ZERO if cand_min == 0 else _CONSTANT
    if candidate * _GROSS < reference:
        return "has collapsed"
    return "has grown" if candidate > reference * _GROSS else ""


def _range_remark(kind: str, run: list[SiteResult]) -> str:
    name = str(address(run[0]))
    if len(run) > 1:
        name = f"{name} to {address(run[-1])} ({counted(len(run), 'layer')})"
    worst = max(run, key=_disproportion)
    reference, candidate = span(worst.ref_min, worst.ref_max), span(worst.cand_min, worst.cand_max)
    where = f" at {address(worst)}" if len(run) > 1 else ""
    to = {_ZERO: "", _CONSTANT: f" at {number(worst.cand_min or 0.0)}"}.get(kind, f" to {candidate}")
    return f"{name}: the candidate {kind}{to} where the reference spans {reference}{where}"


def _disproportion(site: SiteResult) -> float:
    reference = (site.ref_max or 0.0) - (site.ref_min or 0.0)
    candidate = (site.cand_max or 0.0) - (site.cand_min or 0.0)
    return abs(math.log(candidate / reference)) if candidate / reference > 0 else math.inf
