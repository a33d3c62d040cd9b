"""Which limits and budgets make sense, wherever they are written: in a file, in an option, or in Python."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real

from divergence.errors import ConfigurationError, nearest
from divergence.result import METRICS
from divergence.sites import Site, matches

POLICIES = ("noise-floor", "absolute")


def check_limit(where: str, metric: str, value: object) -> float:
    """Returns `value`, a limit of `metric`, as a float.

    Args:
        where: what to call the place in messages.
        metric: one of `divergence.result.METRICS`.
        value: in the unit of the metric.

    Raises:
        ConfigurationError: there is no such metric, or no figure of it could be that limit.
    """
    if metric not in METRICS:
        hint = nearest(str(metric), METRICS) or f"; known: {', '.join(METRICS)}"
        raise ConfigurationError(f"{where}: '{metric}' is not a metric{hint}")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigurationError(f"{where}: {metric} must be a number, not {value!r}")
    limit = float(value)
    if metric == "cosine":
        good, range_ = -1.0 <= limit <= 1.0, "between -1 and 1"
    elif metric in {"ratio", "introduced_ratio"}:
        good, range_ = limit > 0 and math.isfinite(limit), "a finite number above 0"
    else:
        good, range_ = limit >= 0 and math.isfinite(limit), "a finite number, 0 or more"
    if not good:
        raise ConfigurationError(f"{where}: {metric} is {limit:g} and must be {range_}")
    return limit


def check_tolerance(policy: str, ratio: object, sites: Mapping[str, object]) -> None:
    """Checks what a `divergence.Tolerance` is made of.

    Raises:
        ConfigurationError: there is no such policy, a limit makes no sense, or nothing would be judged.
    """
    if policy not in POLICIES:
        hint = nearest(str(policy), POLICIES) or f"; use one of {', '.join(POLICIES)}"
        raise ConfigurationError(f"tolerance: policy is '{policy}', which is not known{hint}")
    check_limit("tolerance", "ratio", ratio)
    judged = False
    for pattern, limits in sites.items():
        if not isinstance(limits, Mapping):
            raise ConfigurationError(
                f"tolerance: '{pattern}' has {limits!r}; give limits by metric such as {{'cosine': 0.999}}"
            )
        for metric, limit in limits.items():
            check_limit(f"tolerance of '{pattern}'", metric, limit)
            judged = judged or metric != "ratio"
    if policy == "absolute" and not judged:
        raise ConfigurationError(
            "tolerance: policy is 'absolute' but no limit is given, so that nothing would be judged; add one "
            "such as sites={'*': {'mse': 1e-5}}"
        )


def limits_at(sites: Mapping[str, Mapping[str, float]], site: Site) -> dict[str, float]:
    """The limits at `site` by metric, of those by pattern: of one metric the pattern written last counts."""
    merged: dict[str, float] = {}
    for pattern, limits in sites.items():
        if matches(site, pattern):
            merged.update(limits)
    return merged


def check_memory(memory: object) -> None:
    """Checks a budget for tensors.

    Raises:
        ConfigurationError: it is no number of bytes.
    """
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        raise ConfigurationError(f"memory is {memory!r}; give bytes, a whole number above 0")
