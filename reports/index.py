"""The index of many comparisons, of a test session or of pairs: `index.html` and `index.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from divergence.pairs_result import INDEX, Pairs
from divergence.reports.assertion import cause, figures
from divergence.reports.words import first_site
from divergence.result import Comparison, Verdict
from divergence.verdict import of_several

SCHEMA = 1
_ORDER = {"fail": 0, "error": 1, "pass": 2}

Entry = Mapping[str, Any]


def entry_of(result: Comparison, test: str, number: int, folder: str) -> dict[str, Any]:
    """What the index says of a comparison: JSON values only.

    Args:
        result: the comparison.
        test: node id of its test.
        number: 1 for the first comparison of the test, 2 for the second, ...
        folder: name of the folder of its reports, beside the index.
    """
    return {"test": test, "number": number, **_facts(result), "folder": folder}


def entries_of(pairs: Pairs) -> list[dict[str, Any]]:
    """What the index says of pairs; `number` is the place of a pair among them."""
    return [
        {
            "pair": pair.name,
            "name": pair.candidate,
            "sample": pair.sample,
            "number": number,
            **_facts(pair.comparison),
            "folder": pair.folder,
        }
        for number, pair in enumerate(pairs.pairs, 1)
    ]


def _facts(result: Comparison) -> dict[str, Any]:
    site = first_site(result)
    return {
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
    }


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """The entries with those that need a reader first: fail, error, pass, each by name and number."""
    return sorted(entries, key=lambda e: (_ORDER[e["verdict"]], _natural(_name(e)), e["number"]))


def _name(entry: Entry) -> str:
    return str(entry["test"] if "test" in entry else entry["pair"])


def _natural(text: str) -> list[tuple[int, str]]:
    """A key by which `test[2]` comes before `test[10]`."""
    parts = re.split(r"([0-9]+)", text)
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)]


def counts(entries: Sequence[Entry]) -> dict[str, int]:
    """Comparisons by verdict."""
    return {verdict: sum(e["verdict"] == verdict for e in entries) for verdict in ("pass", "fail", "error")}


def headline(entries: Sequence[Entry]) -> tuple[Verdict, str]:
    """The verdict of the session and a sentence."""
    return of_several([entry["verdict"] for entry in entries], "comparison")


def write_index(entries: Sequence[Entry], out: Path) -> Path:
    """Writes `index.json` and `index.html` of a test session into `out`.

    Returns:
        The page.

    Raises:
        OSError: they cannot be written.
    """
    verdict, said = headline(entries)
    return _write("session", entries, out, verdict, said)


def write_pairs_index(pairs: Pairs, out: Path) -> Path:
    """Writes `index.json` and `index.html` of pairs into `out`, as `write_index` does."""
    about = {"reference": pairs.reference, "environment": pairs.environment, "command": pairs.command}
    return _write("pairs", entries_of(pairs), out, pairs.verdict, pairs.reason, **about)


def _write(
    kind: str, entries: Sequence[Entry], out: Path, verdict: Verdict, said: str, **about: object
) -> Path:
    from divergence.reports.html import render_index

    ordered = in_order(entries)
    content = {
        "schema": SCHEMA,
        "kind": kind,
        "verdict": verdict,
        "counts": counts(ordered),
        **about,
        "comparisons": ordered,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / INDEX).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    page = out / "index.html"
    page.write_text(render_index(ordered, verdict, said, counts(ordered), kind), encoding="utf-8")
    return page
