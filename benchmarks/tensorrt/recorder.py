"""Records what the worker answers about an engine, for the tests that have no device."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from divergence.probes import Progress, silent
from divergence.probes.tensorrt.process import Worker


class Recorder:
    """A worker that keeps what it answered.

    Facts and the inspector's text go to `JOB.json.gz`, tensors to `tensors.safetensors`, those of fp32
    that fp16 or bf16 holds exactly in that type.

    Args:
        worker: the worker.
        folder: where to keep it.
    """

    def __init__(self, worker: Worker, folder: Path) -> None:
        self.worker = worker
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def call(
        self, job: str, request: Mapping[str, Any], *, about: str, progress: Progress = silent
    ) -> dict[str, Any]:
        """See `Worker.call`."""
        answer = self.worker.call(job, request, about=about, progress=progress)
        with gzip.open(self.folder / f"{job.rpartition(':')[2]}.json.gz", "wt") as file:
            json.dump(answer, file)
        if "outputs" in request:
            tensors = {name: narrowed(t) for name, t in load_file(request["outputs"]).items()}
            save_file(tensors, self.folder / "tensors.safetensors")
        return answer


def narrowed(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in the narrowest floating type that holds it exactly."""
    if tensor.dtype is torch.float32:
        for dtype in (torch.float16, torch.bfloat16):
            if torch.equal(tensor.to(dtype).float(), tensor):
                return tensor.to(dtype)
    return tensor
