"""What the comparisons of one command share: choices, inputs, and where captures are made."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from divergence.captures import Capture, CaptureWriter
from divergence.config import Config, Tolerance
from divergence.errors import DivergenceError, InputError
from divergence.inputs import digest, load_inputs, token_masks
from divergence.probes import Probe, Progress
from divergence.sources import is_engine, open_source

if TYPE_CHECKING:
    import torch

    from divergence.probes.tensorrt.options import EngineOptions
    from divergence.probes.tensorrt.probe import TensorRTProbe
    from divergence.reference_cache import ReferenceCache

Inputs = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True)
class Options:
    """Choices of a comparison; see `compare`."""

    precision: str | None = None
    detail: bool = False
    replay: Literal["auto", "always", "never"] = "auto"
    floor: object = None
    memory: int = 512 << 20
    command: str = ""
    engine: EngineOptions | None = None
    diagnose: bool = True


@dataclass(frozen=True)
class Setting:
    """What all comparisons of a command share.

    Attributes:
        exclude: patterns of sites not to compare.
        folder: where captures are made.
        early: probes that were opened before the reference ran, by source (`get_ready`).
        references: those that ran in earlier comparisons, or None to run every one anew.
    """

    config: Config
    options: Options
    inputs: Inputs
    tolerance: Tolerance
    exclude: Sequence[str]
    folder: Path
    progress: Progress
    early: dict[str, Probe] = field(default_factory=dict)
    references: ReferenceCache | None = None

    def get_ready(self, candidates: Sequence[object]) -> None:
        """Lets the first engine among `candidates` load its libraries while the reference runs."""
        for candidate in candidates:
            if not isinstance(candidate, str | Path) or not is_engine(candidate, self.config):
                continue
            # What is wrong with it is said when its turn comes.
            with contextlib.suppress(DivergenceError):
                probe = open_source(candidate, self.config, engine=self.options.engine)
                _engine_of(probe).start()
                self.early[str(candidate)] = probe
            return

    def open(self, source: object, reference: Capture) -> Probe:
        """The probe of a candidate.

        Raises:
            DivergenceError: as `divergence.sources.open_source`.
        """
        options = self.options
        probe = self.early.pop(str(source), None) or open_source(
            source, self.config, reference=reference, memory=options.memory, engine=options.engine
        )
        if probe.kind == "tensorrt":
            _engine_of(probe).reference = reference  # it may have been opened before the reference ran
        return probe

    def close(self) -> None:
        """Ends what was got ready and never used."""
        for probe in self.early.values():
            _engine_of(probe).close()
        self.early.clear()

    def record(self, probe: Probe, name: str, **run: Any) -> Capture:
        """Runs `probe` into the capture called `name`."""
        path = self.folder / f"{name}.capture"
        return record(probe, self.inputs, path, detail=self.options.detail, progress=self.progress, **run)


def _engine_of(probe: Probe) -> TensorRTProbe:
    from divergence.probes.tensorrt.probe import TensorRTProbe

    inner = getattr(probe, "probe", probe)
    assert isinstance(inner, TensorRTProbe)
    return inner


def read_inputs(inputs: Inputs | str | None, config: Config) -> Inputs:
    """The tensors by input name that `inputs`, or else the configuration, names.

    Raises:
        InputError: neither names any, or they cannot be read.
    """
    if inputs is None:
        if config.inputs is None:
            raise InputError(
                "no inputs: give --inputs FILE (.safetensors, .npz, FILE.py:FUNC), "
                "or set inputs in divergence.toml"
            )
        inputs = config.inputs
    return load_inputs(inputs, config.base) if isinstance(inputs, str) else dict(inputs)


def record(
    probe: Probe, inputs: Inputs, path: Path, *, detail: bool, progress: Progress, **run: Any
) -> Capture:
    """Runs `probe` into a capture at `path`."""
    with CaptureWriter(path) as writer:
        facts = probe.run(inputs, writer, detail=detail, progress=progress, **run)
        for stack, mask in token_masks(inputs, facts.stacks).items():
            writer.add_mask(stack, mask)
        return writer.close(facts, digest(inputs))
