"""Tolerances as tests write them: in a marker, or as an argument of `divergence.assert_close`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeAlias

from divergence.config import Tolerance, parse_tolerance
from divergence.errors import ConfigurationError

Thresholds: TypeAlias = Tolerance | str | Mapping[str, float | Mapping[str, float]] | Iterable[str]


def with_thresholds(base: Tolerance, given: object, where: str) -> Tolerance:
    """`base` with `given` applied.

    Args:
        base: the tolerance so far.
        given: one of

            - a text as of `--tolerance`, or several: `"layers.*.key:cosine=0.999"` replaces the noise
              floor at these sites, `"ratio=8"` keeps it;
            - limits by site pattern as of `[tolerance.sites]`, which apply beside the noise floor:
              `{"ratio": 8, "layers.*.key": {"cosine": 0.999}}`;
            - a `Tolerance`, which takes the place of `base`.
        where: what to call the place in messages.

    Raises:
        ConfigurationError: it has another form, names no metric, or its limit makes no sense.
    """
    if isinstance(given, Tolerance):
        return given
    if isinstance(given, Mapping):
        return _from_mapping(base, given, where)
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, Iterable):
        raise ConfigurationError(
            f"{where}: a tolerance is a text such as 'layers.*.key:cosine=0.999', a mapping of patterns to "
            f"limits or a divergence.Tolerance, not {type(given).__name__}"
        )
    for text in texts:
        if not isinstance(text, str):
            raise ConfigurationError(f"{where}: {text!r} is no text such as 'layers.*.key:cosine=0.999'")
        base = _parsed(text, base, where)
    return base


def _from_mapping(base: Tolerance, given: Mapping[object, object], where: str) -> Tolerance:
    for pattern, limits in given.items():
        if not isinstance(pattern, str) or not pattern:
            raise ConfigurationError(f"{where}: {pattern!r} is no pattern of sites such as 'layers.*.key'")
        if pattern == "ratio":
            base = _parsed(f"ratio={_number(limits, where, pattern)!r}", base, where)
            continue
        if not isinstance(limits, Mapping):
            raise ConfigurationError(
                f"{where}: '{pattern}' has {limits!r}; give limits by metric such as {{'cosine': 0.999}}"
            )
        for metric, limit in limits.items():
            number = _number(limit, where, f"{pattern}: {metric}")
            parsed = _parsed(f"{pattern}:{metric}={number!r}", base, where)
            base = replace(parsed, absolute=base.absolute)
    return base


def _number(value: object, where: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigurationError(f"{where}: {name} must be a number, not {value!r}")
    return float(value)


def _parsed(text: str, base: Tolerance, where: str) -> Tolerance:
    try:
        return parse_tolerance(text, base)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {str(error).removeprefix('--tolerance ')}") from None
