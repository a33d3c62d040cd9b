"""What runs of an engine say of it beside their tensors: whether streams are waited for, whether looking
changed anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from divergence.comparison import compare_tensors

if TYPE_CHECKING:
    import torch


def hazard_of(runs: Mapping[str, tuple[dict[str, Any], dict[str, torch.Tensor]]]) -> dict[str, Any]:
    """The stream-hazard verdict over all hosts that ran.

    Args:
        runs: facts of the run and its tensors by name, by host.
    """
    evidence = []
    looked = False
    for host, (facts, _) in runs.items():
        looked = looked or facts["hazards"] is not None
        for hazard in facts["hazards"] or ():
            outputs = ", ".join(f"{n} ({c} elements)" for n, c in hazard["outputs"].items())
            evidence.append(f"host {host}: {hazard['claim']}: {outputs}")
        if facts["varying"] and not any(h["trial"] == "repeated" for h in facts["hazards"] or ()):
            evidence.append(f"host {host}: results change from run to run: {', '.join(facts['varying'])}")
    if len(runs) > 1:
        (first, (_, a)), (second, (_, b)) = runs.items()
        for name, tensor in a.items():
            metrics = compare_tensors(tensor, b[name])
            if not metrics.bit_equal:
                evidence.append(f"hosts {first} and {second} differ in {name} by up to {metrics.max_abs}")
    return {"looked": looked, "hazard": bool(evidence), "evidence": evidence, "hosts": list(runs)}


def remarks_on(hazard: Mapping[str, Any], observer: Mapping[str, Any] | None) -> list[str]:
    """What notes say of the stream-hazard verdict and of the observer check (None if there was none)."""
    remarks = []
    if hazard["hazard"]:
        remarks.append(f"Stream hazard: {'; '.join(hazard['evidence'])}.")
    elif len(hazard["hosts"]) > 1:
        remarks.append(
            f"Hosts {' and '.join(hazard['hosts'])} agree to the bit, and no stream hazard was found."
        )
    if observer is not None and observer["changed"]:
        worst = max((o["rel_l2"] or 0.0) for o in observer["outputs"].values())
        remarks.append(
            "Looking changed the engine: its final outputs differ from those of the engine without added "
            f"outputs by a relative error of {worst:.2g}."
        )
    elif observer is not None:
        remarks.append("Looking changed nothing: the final outputs equal the plain engine's to the bit.")
    return remarks
