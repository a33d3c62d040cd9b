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


def contract_of(facts: RunFacts) -> Mapping[str, Any]:
    """The contract of the engine that ran, empty where there is none."""
    found = facts.details.get("contract")
    return found if isinstance(found, Mapping) else {}


def ran_in(facts: RunFacts, role: str) -> Iterator[str]:
    """A sentence for every half precision that operators of `role` ran in, with the first of them."""
    seen: dict[str, list[str]] = {}
    for entry in _entries(contract_of(facts)):
        if entry.get("role") != role:
            continue
        precision = _HALF.get(str(entry.get("dtype", entry.get("precision", ""))))
        if precision is not None:
            name = str(entry.get("module") or entry.get("node") or entry.get("name") or "?")
            seen.setdefault(precision, []).append(name)
    for precision, names in seen.items():
        yield f"the engine ran its {role} in {precision}: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"


def accumulators(facts: RunFacts) -> Iterator[str]:
    """A sentence for every half precision that products of the engine are summed in."""
    seen: dict[str, list[str]] = {}
    for entry in _entries(contract_of(facts)):
        precision = _HALF.get(str(entry.get("accumulator", "")))
        if precision is not None:
            seen.setdefault(precision, []).append(str(entry.get("module") or entry.get("name") or "?"))
    for precision, names in seen.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"the engine sums the products of {names[0]}{more} in {precision}"


def _entries(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        if "role" in value:
            yield value
        for item in value.values():
            yield from _entries(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _entries(item)
