"""The candidate computes something else when it is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from divergence.diagnosis.hypotheses import Told

if TYPE_CHECKING:
    from divergence.diagnosis.case import Given

ID = "observer_effect"


def told(given: Given) -> Told | None:
    """What the probe found out by running the candidate with and without the sites as outputs."""
    found = given.facts.details.get("observer")
    if not isinstance(found, Mapping) or not found.get("changed"):
        return None
    sizes = [o["max_abs"] for o in found.get("outputs", {}).values() if o.get("max_abs") is not None]
    amount = f" by up to {max(sizes):.4g}" if sizes else ""
    return Told(
        ID,
        "exposing the sites as outputs changes what the candidate computes",
        (f"the model's own outputs differ{amount} between a run with and one without the extra outputs",),
        "compare the model's own outputs, or expose fewer sites at a time: an output ends a fusion, so "
        "that what was measured here is not what runs in production",
    )
