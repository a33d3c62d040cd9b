"""What the template of the page shows: names, words and rounded figures, nothing computed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from divergence import __version__
from divergence.reports import exceeded_limits, figure, in_words, judged, number, plain, span, times
from divergence.reports.axes import axis_size
from divergence.reports.drawing import heat_scale, house_style, plots, tensors_of
from divergence.reports.html.blocks import blocks, flat
from divergence.reports.html.svg import embedded
from divergence.reports.layers import Row, layer_rows, range_remarks
from divergence.reports.words import (
    error_of,
    explained,
    first_site,
    judged_by,
    limits,
    part,
    place,
    propagated,
    story,
    tally,
    worst_site,
)
from divergence.result import METRICS, Cause, Comparison, Hypothesis, SiteResult

_KINDS = ("accumulation", "range", "head", "token", "spread")

COLUMNS = (
    "ratio",
    "introduced",
    "introduced_floor",
    "rel_l2",
    "floor",
    "row_rel_l2",
    "cosine",
    "mse",
    "max_abs",
    "mean_abs",
)
_HEADS = {
    "ratio": "error / floor",
    "introduced": "introduced",
    "introduced_floor": "its floor",
    "rel_l2": "cumulative",
    "floor": "its floor",
    "row_rel_l2": "median token",
    "cosine": "cosine",
    "mse": "MSE",
    "max_abs": "max abs",
    "mean_abs": "mean abs",
}
_ARROWS = {"lower": "↓", "higher": "↑", "neither": ""}


def view(comparison: Comparison) -> dict[str, Any]:
    """The variables of the template."""
    rows = layer_rows(comparison.sites)
    figures: dict[str, list[dict[str, Any]]] = {kind: [] for kind in _KINDS}
    with house_style():
        for plot in plots(comparison):
            svg = Markup(embedded(plot))  # noqa: S704 (escaped by the XML writer)
            figures[plot.kind].append({"tensor": plot.tensor, "title": plot.title, "svg": svg})
    site = first_site(comparison)
    return {
        "version": __version__,
        "comparison": comparison,
        "story": story(comparison),
        "place_name": place(site) if site is not None else "",
        "first_name": comparison.first_divergence.site if comparison.first_divergence else "",
        "causes": [_cause(c, comparison) for c in comparison.causes],
        "tried": [_hypothesis(h) for h in comparison.diagnosis],
        "facts": _facts(comparison),
        "tally": tally(comparison.sites),
        "grid": _grid(comparison, rows),
        "groups": _groups(rows),
        "outputs": [_cell(s, i, comparison) for i, s in enumerate(comparison.sites) if s.layer is None],
        "figures": figures,
        "tensors": sorted({s.tensor for s in comparison.sites}),
        "replayed": any(s.introduced is not None for s in comparison.sites),
        "broken": any(s.cand_nonfinite > s.ref_nonfinite for s in comparison.sites),
        "heat": heat_scale(comparison.sites).ends,
        "columns": [_column(name) for name in COLUMNS],
        "table": [_table_row(s, comparison) for s in comparison.sites],
        "remarks": range_remarks(comparison.sites),
        "unmatched": [u for u in comparison.unmatched if u.state != "excluded"],
        "excluded": [u for u in comparison.unmatched if u.state == "excluded"],
        "contract": blocks(comparison.contract),
        "environment": flat(comparison.environment),
    }


def page_data(comparison: Comparison) -> str:
    """What the script knows, as JSON in which neither a tag nor a comment can begin."""
    rows = layer_rows(comparison.sites)
    index = {(row.call, row.stack, row.layer): i for i, row in enumerate(rows)}
    drawn = set(tensors_of(rows))
    content = {
        "sites": [
            {
                "id": plain(site.site),
                "row": index.get((site.call, site.stack, site.layer)) if site.layer is not None else None,
                "tensor": plain(site.tensor),
                "verdict": site.verdict,
                "values": [_raw(_value(site, name, comparison)) for name in COLUMNS],
                "words": plain(_words(site, comparison)),
                "sizes": {"token": axis_size(site, "token"), "head": axis_size(site, "head")},
                "facts": _details(site, comparison),
                "token": [_raw(v, 2) for v in site.profile.token] if site.tensor in drawn else [],
                "head": [_raw(v, 2) for v in site.profile.head] if site.tensor in drawn else [],
            }
            for site in comparison.sites
        ],
        "rows": [plain(_row_name(row)) for row in rows],
        "first": plain(first.site) if (first := first_site(comparison) or worst_site(comparison)) else None,
    }
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _raw(value: float | None, digits: int = 6) -> float | str | None:
    if value is None:
        return None
    return float(f"{value:.{digits - 1}e}") if math.isfinite(value) else figure(value)


def _value(site: SiteResult, name: str, comparison: Comparison) -> float | None:
    """A column's figure; the ratio is the one judged."""
    value = judged(site, comparison.policy).ratio if name == "ratio" else getattr(site, name)
    return None if value is None else float(value)


def _words(site: SiteResult, comparison: Comparison) -> str:
    if site.bit_equal:
        return "equal to the bit"
    return site.reason or in_words(site, comparison.policy)


def _details(site: SiteResult, comparison: Comparison) -> list[tuple[str, str]]:
    """The figures of a site for the panel, those left out that do not exist."""
    by = judged(site, comparison.policy)
    bound = f"at most {number(by.limit)}x" if comparison.policy.policy == "noise-floor" else ""
    at = f" at [{', '.join(map(str, site.max_abs_at))}]" if site.max_abs_at is not None else ""
    rows = [
        ("introduced", _of_floor(site.introduced, site.introduced_ratio, site.introduced_floor)),
        ("cumulative", _of_floor(site.rel_l2, site.ratio, site.floor)),
        ("limit", "; ".join(filter(None, (bound, *exceeded_limits(site, comparison.policy))))),
        ("median token", figure(site.row_rel_l2)),
        ("cosine", number(site.cosine, 6) if site.cosine is not None else "-"),
        ("MSE", figure(site.mse)),
        ("max abs", f"{number(site.max_abs, 3)}{at}" if site.max_abs is not None else "-"),
        ("mean abs", figure(site.mean_abs)),
        ("range, reference", span(site.ref_min, site.ref_max)),
        ("range, candidate", span(site.cand_min, site.cand_max)),
        ("NaN or Inf", _nonfinite(site)),
        ("at padding", number(site.padded_max_abs, 3) if site.padded_max_abs is not None else "-"),
        ("shape", f"[{', '.join(map(str, site.shape))}]" if site.shape else "-"),
        ("dtypes", " against ".join(filter(None, (site.ref_dtype, site.cand_dtype)))),
        ("layout", site.layout),
        ("found, reference", site.found_ref),
        ("found, candidate", site.found_cand),
    ]
    return [(name, plain(text)) for name, text in rows if text not in ("", "-", "[]")]


def _of_floor(error: float | None, ratio: float | None, floor: float | None) -> str:
    if error is None:
        return ""
    if floor is None:
        return figure(error)
    return f"{figure(error)}, {times(ratio)} its floor of {figure(floor)}"


def _nonfinite(site: SiteResult) -> str:
    if not site.cand_nonfinite and not site.ref_nonfinite:
        return ""
    return f"{site.cand_nonfinite} in the candidate, {site.ref_nonfinite} in the reference"


def _row_name(row: Row) -> str:
    extra = [row.stack] if row.stack else []
    extra += [f"call {row.call}"] if row.call != 1 else []
    return f"layer {row.layer}" + (f" ({', '.join(extra)})" if extra else "")


def _state(site: SiteResult, comparison: Comparison) -> str:
    return "over" if propagated(site, comparison.policy) else site.verdict


def _cell(site: SiteResult, i: int, comparison: Comparison) -> dict[str, Any]:
    state = _state(site, comparison)
    ratio = judged(site, comparison.policy).ratio
    figures = " ".join(
        filter(None, (error_of(site, comparison.policy), times(ratio) if ratio is not None else ""))
    )
    return {"site": site.site, "index": i, "state": state, "label": f"{site.site}: {state}, {figures}"}


def _grid(comparison: Comparison, rows: Sequence[Row]) -> list[tuple[str, list[dict[str, Any] | None]]]:
    """Verdicts, a line a tensor, a cell a layer call."""
    place_of = {id(site): i for i, site in enumerate(comparison.sites)}
    return [
        (
            tensor,
            [
                _cell(row.sites[tensor], place_of[id(row.sites[tensor])], comparison)
                if tensor in row.sites
                else None
                for row in rows
            ],
        )
        for tensor in tensors_of(rows)
    ]


def _groups(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """Names of the stacks and calls and how many layers each has; none where there is only one."""
    found: dict[tuple[str, int], int] = {}
    for row in rows:
        found[row.stack, row.call] = found.get((row.stack, row.call), 0) + 1
    if len(found) < 2:
        return []
    return [
        (" ".join(filter(None, (stack, f"call {call}" if call != 1 or not stack else ""))), n)
        for (stack, call), n in found.items()
    ]


def _column(name: str) -> dict[str, str]:
    info = METRICS.get(name)
    what = (
        info.label if info else "noise floor of that error: the reference's own, in the candidate's precision"
    )
    unit = info.unit if info else "1"
    better = info.better if info else "neither"
    direction = {"lower": "lower is better", "higher": "higher is better", "neither": ""}[better]
    if name == "ratio":
        what = "error judged over its noise floor"
    return {
        "name": name,
        "head": _HEADS[name],
        "arrow": _ARROWS[better],
        "title": "; ".join(filter(None, (f"{what} (unit: {unit})", direction))),
    }


def _table_row(site: SiteResult, comparison: Comparison) -> dict[str, Any]:
    cells = []
    for name in COLUMNS:
        value = _value(site, name, comparison)
        if name == "ratio":
            cells.append("equal" if site.bit_equal else times(value))
        elif name in ("cosine", "max_abs"):
            digits = 6 if name == "cosine" else 3
            cells.append(number(value, digits) if value is not None else "-")
        else:
            cells.append(figure(value))
    return {
        "site": site,
        "state": _state(site, comparison),
        "cells": cells,
        "ref": span(site.ref_min, site.ref_max),
        "cand": "NaN or Inf"
        if site.cand_nonfinite > site.ref_nonfinite
        else span(site.cand_min, site.cand_max),
    }


def _cause(cause: Cause, comparison: Comparison) -> dict[str, Any]:
    where = cause.site
    first = comparison.first_divergence.site if comparison.first_divergence else ""
    share = cause.explained
    return {
        "title": cause.title,
        "id": cause.id,
        "evidence": cause.evidence,
        "fix": cause.fix,
        "share": f"{number(100 * share)} %" if share is not None and math.isfinite(share) else "",
        "bar": max(0.0, min(100.0, 100 * share)) if share is not None and math.isfinite(share) else None,
        "explained": explained(share),
        "site": where if where and where != first else "",
        "parameters": flat(cause.parameters),
    }


def _hypothesis(tried: Hypothesis) -> dict[str, str]:
    return {
        "site": tried.site,
        "explanation": tried.title,
        "explains": part(tried.explained) if tried.explained is not None else "",
        "for": "; ".join(tried.evidence_for),
        "against": "; ".join(tried.evidence_against),
    }


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    policy = comparison.policy
    worst = worst_site(comparison)
    ratio = judged(worst, policy).ratio if worst is not None else None
    precision = " ".join(
        filter(None, (policy.precision, f"({policy.precision_from})" if policy.precision_from else ""))
    )
    facts = [
        (
            "largest ratio",
            f"{times(ratio)} at {worst.site}" if worst is not None and ratio is not None else "",
        ),
        ("judged by", judged_by(policy)),
        ("precision", precision),
        ("noise floor", policy.floor_from),
        ("limits", "; ".join(limits(policy))),
    ]
    return [(name, plain(text)) for name, text in facts if text]
