"""What there is to ask for: a comparison of two sources, or the capture of one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from divergence.captures import Capture
from divergence.config import Config, load_config
from divergence.inputs import Given
from divergence.job import Job
from divergence.limits import check_memory
from divergence.prepared import prepared
from divergence.probes import Progress, silent
from divergence.result import Comparison
from divergence.setting import Options, read_inputs, record
from divergence.sources import open_source
from divergence.storage import recorded
from divergence.thresholds import Thresholds

if TYPE_CHECKING:
    from divergence.probes.tensorrt.options import EngineOptions
    from divergence.reference_cache import ReferenceCache

__all__ = ["capture", "compare", "record", "timed"]


def compare(
    ref: object,
    cand: object,
    inputs: Given | None = None,
    *,
    precision: str | None = None,
    tolerance: Thresholds | None = None,
    exclude: str | Sequence[str] = (),
    detail: bool = False,
    replay: Literal["auto", "always", "never"] = "auto",
    floor: object = None,
    memory: int = 512 << 20,
    engine: EngineOptions | None = None,
    keep: Path | None = None,
    config: Config | None = None,
    command: str = "",
    diagnose: bool = True,
    repro: Path | None = None,
    references: ReferenceCache | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Compares a candidate with a reference, layer by layer.

    Args:
        ref: the reference: a source (see `divergence.sources.open_source`).
        cand: the candidate: a source.
        inputs: tensors or numpy arrays by input name, or where to load them from; by default the
            configuration's.
        precision: what the candidate is meant to run in, where it does not show it itself.
        tolerance: what to judge by, on top of the configuration's
            (`divergence.thresholds.with_thresholds`).
        exclude: patterns of sites not to compare, or one, beside the configuration's.
        detail: also compare query, attention, norms and MLP of every layer.
        replay: `auto` replays the reference's layers on the candidate's inputs unless the cumulative
            errors alone settle that the candidate passes.
        floor: a source whose error against the reference is the noise floor, where the reference is no
            PyTorch module that could be run in the candidate's precision.
        memory: bytes of host memory for tensors; what does not fit goes to disk (docs/memory.md).
        engine: how TensorRT engines are run.
        keep: folder to keep both captures in.
        config: the configuration; by default the one found in the current folder.
        command: what the user ran, for the report.
        diagnose: look for the cause when the candidate fails.
        repro: folder to write the first failing layer to, so that it can be replayed alone.
        references: runs of references to use again, as a test session keeps them; none by default.
        progress: told about long work.

    Raises:
        DivergenceError: the question cannot be asked; the message says why and how to mend it.
    """
    started = time.monotonic()
    config = load_config() if config is None else config
    options = Options(
        precision,
        detail,
        replay,
        floor,
        memory,
        command,
        engine,
        diagnose,
        repro,
    )
    with prepared(
        ref,
        [cand],
        inputs,
        config=config,
        options=options,
        tolerance=tolerance,
        exclude=exclude,
        keep=keep,
        progress=progress,
        references=references,
    ) as (setting, reference):
        result = Job(setting, reference).run(cand)
    return timed(result, started)


def capture(
    source: object,
    inputs: Given | None,
    path: str | Path,
    *,
    detail: bool = False,
    reference: Capture | None = None,
    memory: int = 512 << 20,
    engine: EngineOptions | None = None,
    config: Config | None = None,
    progress: Progress = silent,
) -> Capture:
    """Runs `source` on `inputs` and records all its sites in the folder `path`.

    Args:
        source, inputs, detail, memory, engine, config, progress: as for `compare`.
        path: folder to make, or its URL; an existing capture there is replaced when the new one is complete.
        reference: capture of the reference, which helps to find the sites of an ONNX model.

    Raises:
        DivergenceError: the source cannot be run, or the capture cannot be written.
    """
    check_memory(memory)
    config = load_config() if config is None else config
    tensors = read_inputs(inputs, config)
    probe = open_source(source, config, reference=reference, memory=memory, engine=engine)
    return recorded(
        path,
        lambda folder: record(probe, tensors, folder, detail=detail, progress=progress, mask=config.mask),
    )


def timed(result: Comparison, started: float) -> Comparison:
    """`result` with the seconds since `started` (`time.monotonic`) in its environment."""
    seconds = round(time.monotonic() - started, 3)
    return replace(result, environment={**result.environment, "seconds": seconds})
