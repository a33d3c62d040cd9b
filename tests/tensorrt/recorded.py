"""Engines that ran on a device once, from `tests/data/tensorrt/recorded`."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from divergence.probes import Progress, silent
from divergence.probes.tensorrt.plan import digest_of
from divergence.probes.tensorrt.probe import TensorRTProbe
from divergence.probes.tensorrt.sidecar import beside, load_sidecar

FOLDER = Path(__file__).parents[1] / "data" / "tensorrt" / "recorded"


class Replayed:
    """A worker that answers as the one that was recorded in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def call(
        self,
        job: str,
        request: Mapping[str, Any],
        *,
        about: str,
        progress: Progress = silent,
    ) -> dict[str, Any]:
        """See `divergence.probes.tensorrt.process.Worker.call`; the one job that was recorded is a run."""
        assert job.endswith(":run"), f"{job} was not recorded"
        if "outputs" in request:
            shutil.copy(self.folder / "tensors.safetensors", request["outputs"])
        answer: dict[str, Any] = json.loads(gzip.decompress((self.folder / "run.json.gz").read_bytes()))
        return answer


def recorded_engine(name: str, folder: Path) -> TensorRTProbe:
    """The probe of a recorded engine.

    Args:
        name: of its folder in `FOLDER`.
        folder: where the plan is put; the head of the file is all there is of it.
    """
    recording = FOLDER / name
    plan = folder / f"{name}.plan"
    plan.write_bytes((recording / "head").read_bytes())
    beside(plan).write_bytes(gzip.decompress((recording / "sidecar.json.gz").read_bytes()))
    sidecar = load_sidecar(plan)
    assert sidecar is not None
    dataclasses.replace(sidecar, plan_digest=digest_of(plan)).save(plan)
    return TensorRTProbe(plan, runner=Replayed(recording))
