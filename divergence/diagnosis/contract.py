"""What an engine says of itself: which precision the operators of a role ran in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from divergence.probes import RunFacts

_HALF = {"Half": "fp16", "FP16": "fp16", "float16": "fp16", "fp16": "fp16"} | {
    "BFloat16": "bf16",
    "BF16": "bf16",
    "bfloat16": "bf16",
    "bf16": "bf16",
}

_PLACES = 3


def contract_of(facts: RunFacts) -> Mapping[str, Any]:
    """The contract of the engine that ran, empty where there is none."""
    found = facts.details.get("contract")
    return found if isinstance(found, Mapping) else {}


def ran_in(facts: RunFacts, role: str) -> Iterator[str]:
    """A sentence for every half precision that operators of `role` ran in: where, inside which kernel, and
    what the graph asks for instead."""
    from divergence.probes.tensorrt.clauses import short

    by_precision: dict[str, list[Mapping[str, Any]]] = {}
    for row in _rows(facts):
        precision = _HALF.get(str(row.get("precision", "")))
        if row.get("role") == role and precision is not None:
            by_precision.setdefault(precision, []).append(row)
    for precision, rows in by_precision.items():
        places = [str(row.get("module") or "outside the layers") for row in rows]
        more = f" and {len(places) - _PLACES} more modules" if len(places) > _PLACES else ""
        own = str(rows[0]["precision"])
        asked = sorted({str(row["asked"]) for row in rows if row.get("asked")} - {own})
        wanted = f" though the graph asks for {' and '.join(asked)}" if asked else ""
        kernel = next((str(name) for row in rows for name in row.get("kernels", ())), "")
        inside = f", inside {short(kernel)}" if kernel else ""
        yield f"the engine ran its {role} in {precision}{wanted}: {', '.join(places[:_PLACES])}{more}{inside}"


def accumulators(facts: RunFacts) -> Iterator[str]:
    """A sentence for every half precision that products of the engine are summed in."""
    by_precision: dict[str, list[str]] = {}
    for row in _rows(facts):
        precision = _HALF.get(str(row.get("accumulator", "")))
        if precision is not None:
            by_precision.setdefault(precision, []).append(str(row.get("module") or "a module without a name"))
    for precision, names in by_precision.items():
        more = f" and {len(names) - 1} more modules" if len(names) > 1 else ""
        yield f"the engine sums the products of {names[0]}{more} in {precision}"


def _rows(facts: RunFacts) -> Iterator[Mapping[str, Any]]:
    rows = contract_of(facts).get("rows")
    if isinstance(rows, list | tuple):
        yield from (row for row in rows if isinstance(row, Mapping))
