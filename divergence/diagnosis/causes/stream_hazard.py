"""The engine and the host work on different CUDA streams without waiting for each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from divergence.diagnosis.hypotheses import Told

if TYPE_CHECKING:
    from divergence.diagnosis.case import Given

ID = "stream_hazard"


def told(given: Given) -> Told | None:
    """What the probe found out by running the engine as the host does, over poisoned outputs."""
    found = given.facts.details.get("stream_hazard")
    if not isinstance(found, Mapping) or not found.get("hazard"):
        return None
    return Told(
        ID,
        "the host reads the outputs before the engine has written them: two CUDA streams that do not wait "
        "for each other",
        tuple(str(line) for line in found.get("evidence", ())),
        "run the engine on the stream that the inputs are written on "
        "(execute_async_v3(torch.cuda.current_stream().cuda_stream)), or synchronise before reading; do not "
        "mix streams of PyTorch and pycuda",
    )
