"""The index of a session: `index.html` and `index.json`, one entry a comparison."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from divergence.reports.assertion import cause, figures
from divergence.reports.words import first_site
from divergence.result import Comparison

SCHEMA = 1
_ORDER = {"fail": 0, "error": 1, "pass": 2}
_HEADLINES = {"pass": "All comparisons pass", "error": "Questions could not be answered"}

Entry = Mapping[str, Any]


def entry_of(result: Comparison, test: str, number: int, folder: str) -> dict[str, Any]:
    """What the index says of a comparison: JSON values only.

    Args:
        result: the comparison.
        test: node id of its test.
        number: 1 for the first comparison of the test, 2 for the second, ...
        folder: name of the folder of its reports, beside the index.
    """
    site = first_site(result)
    return {
        "test": test,
        "number": number,
        "verdict": result.verdict,
        "reason": result.reason,
        "reference": result.reference,
        "candidate": result.candidate,
        "site": None if site is None else site.site,
        "layer": None if site is None else site.layer,
        "tensor": None if site is None else site.tensor,
        "figure": figures(result) if site is not None else result.reason,
        "cause": cause(result).removeprefix("cause: ") if result.verdict == "fail" else "",
        "sites": len(result.sites),
        "seconds": result.environment.get("seconds"),
        "folder": folder,
    }


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """The entries with those that need a reader first: fail, error, pass, each by test and number."""
    return sorted(entries, key=lambda e: (_ORDER[e["verdict"]], _natural(e["test"]), e["number"]))


def _natural(text: str) -> list[tuple[int, str]]:
    """A key by which `test[2]` comes before `test[10]`."""
    parts = re.split(r"([0-9]+)", text)
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)]


def counts(entries: Sequence[Entry]) -> dict[str, int]:
    """Comparisons by verdict."""
    return {verdict: sum(e["verdict"] == verdict for e in entries) for verdict in ("pass", "fail", "error")}


def headline(entries: Sequence[Entry]) -> tuple[str, str]:
    """The verdict of the session and a sentence; without any comparison nothing has been answered."""
    if not entries:
        return "error", "Nothing was compared"
    found = counts(entries)
    if found["fail"]:
        verb = "fails" if found["fail"] == 1 else "fail"
        return "fail", f"{found['fail']} of {len(entries)} comparisons {verb}"
    verdict = "error" if found["error"] else "pass"
    return verdict, _HEADLINES[verdict]


def write_index(entries: Sequence[Entry], out: Path) -> Path:
    """Writes `index.json` and `index.html` into `out`.

    Returns:
        The page.

    Raises:
        OSError: they cannot be written.
    """
    from divergence.reports.html import render_index

    ordered = in_order(entries)
    verdict, said = headline(ordered)
    content = {
        "schema": SCHEMA,
        "kind": "session",
        "verdict": verdict,
        "counts": counts(ordered),
        "comparisons": ordered,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "index.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    page = out / "index.html"
    page.write_text(render_index(ordered, verdict, said, counts(ordered)), encoding="utf-8")
    return page
