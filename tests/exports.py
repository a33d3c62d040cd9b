"""Exports of the small models to ONNX, and what tests ask of a probe that runs them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from divergence.probes import Observation, Probe
from tests.smollm2 import quiet


def exported(model: Any, inputs: Mapping[str, Tensor], path: Path, *, external: bool = False) -> Path:
    """Exports `model` without its caches, by the dynamo exporter."""
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False
    with quiet():
        program: Any = torch.onnx.export(model, (), kwargs=dict(inputs), dynamo=True, verbose=False)
        program.save(path, external_data=external)
    return path


def observed(probe: Probe, inputs: Mapping[str, Tensor], **options: Any) -> dict[str, Observation]:
    """Every observation by site."""
    seen: dict[str, Observation] = {}
    probe.run(inputs, lambda o: seen.__setitem__(str(o.site), o), **options)
    return seen


def laid_out(seen: Observation) -> Tensor:
    """The tensor with its axes in the order that sites of its kind have."""
    if not seen.axes or not seen.site.axes:
        return seen.tensor
    return seen.tensor.permute([seen.axes.index(axis) for axis in seen.site.axes])
