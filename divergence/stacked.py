"""Names of model outputs that hold the tensors of all layers: what they hold, and of which stack."""

from __future__ import annotations

import re
from collections.abc import Iterable

_KEYS = frozenset({"key", "keys", "k"})
_VALUES = frozenset({"value", "values", "v"})
_PAIRS = frozenset({"kv", "past", "present", "presents"})


def role(name: str) -> dict[str, int | None]:
    """The layer tensors that a model output of this name may stack, each with its place in a
    key/value pair (None where the output holds no pairs)."""
    words = _words(name)
    if "last" in words or any(word.isdigit() for word in words):
        return {}
    cross = "cross_" if "cross" in words else ""
    if words & _KEYS and words & _VALUES:
        return {f"{cross}key": 0, f"{cross}value": 1}
    if words & _KEYS:
        return {f"{cross}key": None}
    if words & _VALUES:
        return {f"{cross}value": None}
    if words & _PAIRS:
        return {f"{cross}key": 0, f"{cross}value": 1}
    return {"hidden": None} if "hidden" in words and not cross else {}


def named_stack(name: str, stacks: Iterable[str]) -> str | None:
    """The one of `stacks` that an output's name mentions, of several the one of most words; or None."""
    words = _words(name)
    named = [stack for stack in stacks if stack and _words(stack) <= words]
    return max(named, key=lambda stack: len(_words(stack)), default=None)


def _words(name: str) -> frozenset[str]:
    return frozenset(re.split(r"[^a-z0-9]+", name.lower()))
