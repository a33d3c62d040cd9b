"""What the comparisons of one command share: choices, inputs, and where captures are made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from divergence.budget import Budget
from divergence.captures import Capture
from divergence.config import Config, Tolerance
from divergence.errors import ConfigurationError, InputError, nearest
from divergence.inputs import Digesting, Given, as_inputs, load_inputs
from divergence.limits import check_memory
from divergence.masks import token_masks
from divergence.precision import check_precision
from divergence.probes import Observation, Probe, Progress
from divergence.probes.recorded import RecordedProbe
from divergence.recording import Arrived, CaptureWriter
from divergence.room import fits_twice
from divergence.sources import is_capture, is_runtime_file, open_source
from divergence.working import in_background

if TYPE_CHECKING:
    import torch

    from divergence.probes.tensorrt.options import EngineOptions
    from divergence.reference_cache import ReferenceCache

Inputs = Mapping[str, "torch.Tensor"]

REPLAYS = ("auto", "always", "never")


@dataclass(frozen=True)
class Options:
    """Choices of a comparison; see `compare`.

    Raises:
        ConfigurationError: there is no such precision or way to replay, or `memory` is no number of bytes.
    """

    precision: str | None = None
    detail: bool = False
    replay: Literal["auto", "always", "never"] = "auto"
    floor: object = None
    memory: int = 512 << 20
    command: str = ""
    engine: EngineOptions | None = None
    diagnose: bool = True
    repro: Path | None = None

    def __post_init__(self) -> None:
        if self.precision is not None:
            check_precision(self.precision)
        if self.replay not in REPLAYS:
            hint = nearest(str(self.replay), REPLAYS) or f"; use one of {', '.join(REPLAYS)}"
            raise ConfigurationError(f"replay is '{self.replay}', which is not known{hint}")
        check_memory(self.memory)

    @property
    def under_way(self) -> int:
        """The part of `memory` for tensors that are under way, in bytes."""
        return Budget(self.memory).under_way


@dataclass(frozen=True)
class Setting:
    """What all comparisons of a command share.

    Attributes:
        exclude: patterns of sites not to compare.
        folder: where captures are made.
        early: probes that were opened before the reference ran, by source (`getting_ready`).
        references: those that ran in earlier comparisons, or None to run every one anew.
        keep: make whole captures in `folder`; otherwise it takes only what does not fit into memory.
        budget: memory for tensors, shared by all runs.
    """

    config: Config
    options: Options
    inputs: Inputs
    tolerance: Tolerance
    exclude: Sequence[str]
    folder: Path
    progress: Progress
    early: dict[str, Future[Probe]] = field(default_factory=dict)
    references: ReferenceCache | None = None
    keep: bool = False
    budget: Budget = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", Budget(self.options.memory))

    def open(self, source: object, reference: Capture) -> Probe:
        """The probe of a candidate.

        Raises:
            DivergenceError: as `divergence.sources.open_source`.
        """
        options = self.options
        ready = self.early.pop(str(source), None)
        probe = (
            ready.result()
            if ready is not None
            else open_source(
                source, self.config, reference=reference, memory=options.under_way, engine=options.engine
            )
        )
        inner = _inner(probe)
        if isinstance(inner, Startable):
            inner.refer(reference)  # it may have been opened before the reference ran
        self.check_same_inputs(probe, reference)
        return probe

    def check_same_inputs(self, probe: Probe, reference: Capture) -> None:
        """Where there are no inputs to hold recorded runs to, holds that of `probe` to the reference's.

        Raises:
            InputError: it ran on others.
        """
        inner = _inner(probe)
        if not self.inputs and isinstance(inner, RecordedProbe):
            inner.check_inputs(reference.inputs_digest, "the reference on", "record both on the same")

    def record(self, probe: Probe, name: str, arrived: Arrived | None = None, **run: Any) -> Capture:
        """Runs `probe` into the capture called `name`; one that was recorded before is used as it is.

        Args:
            probe: what to run.
            name: of the capture.
            arrived: told of tensors that stay in memory.
            run: further arguments of the probe's `run`.
        """
        detail = self.options.detail
        if isinstance(probe, RecordedProbe) and not self.keep:
            return probe.recorded(self.inputs, detail=detail)
        return record(
            probe,
            self.inputs,
            self.folder / f"{name}.capture",
            detail=detail,
            progress=self.progress,
            budget=None if self.keep else self.budget,
            arrived=arrived,
            mask=self.config.mask,
            **run,
        )


@contextlib.contextmanager
def getting_ready(
    candidates: Sequence[object], config: Config, options: Options
) -> Iterator[dict[str, Future[Probe]]]:
    """Opens the first candidate that is a file, and lets it load, while inputs are read and the reference
    runs.

    Yields:
        Its probe by its source, to be taken out by whoever uses it; what is left is closed. What is wrong
        with it is raised by whoever takes it.
    """
    early: dict[str, Future[Probe]] = {}
    files = [c for c in candidates if isinstance(c, str | Path) and is_runtime_file(c, config)]
    if files and fits_twice(files[0], config):
        early[str(files[0])] = in_background(lambda: _ready(files[0], config, options), "get-ready")
    try:
        yield early
    finally:
        for future in early.values():
            if not future.cancel() and future.exception() is None:
                getattr(_inner(future.result()), "close", lambda: None)()


def begin(early: Mapping[str, Future[Probe]], inputs: Inputs) -> None:
    """Lets what is ready by now run on the inputs, where it can, while the reference does."""
    for future in early.values():
        if future.done() and not future.cancelled() and future.exception() is None:
            probe = future.result()
            if isinstance(probe, Beginnable):
                probe.begin(inputs)


@contextlib.contextmanager
def comparison_loading(device: str = "cpu") -> Iterator[None]:
    """Loads what compares tensors on `device`, so that the first to be compared need not wait a second or
    more for libraries. Only on machines with a GPU: elsewhere a reference keeps all cores busy, and this
    would hold it up."""
    import torch

    if not torch.cuda.is_available():
        yield
        return
    loader = Thread(target=_compare_once, args=(device,), name="load-comparison", daemon=True)
    loader.start()
    try:
        yield
    finally:
        loader.join()


def _compare_once(device: str) -> None:
    import torch

    from divergence.comparison import compare_tensors

    with contextlib.suppress(Exception):  # whoever compares first is told
        compare_tensors(torch.zeros(1, device=device), torch.ones(1, device=device))


@contextlib.contextmanager
def one_core_spared(early: Mapping[str, Future[Probe]]) -> Iterator[None]:
    """Leaves a core to what is getting ready: where all have work of their own already, threads that
    wait for each other wait for a core, and a forward takes three times as long."""
    import torch

    threads = torch.get_num_threads()
    if threads == 1 or all(future.done() for future in early.values()):
        yield
        return
    torch.set_num_threads(threads - 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _ready(source: str | Path, config: Config, options: Options) -> Probe:
    probe = open_source(source, config, memory=options.under_way, engine=options.engine)
    inner = _inner(probe)
    if isinstance(inner, Startable):
        inner.start(detail=options.detail)
    return probe


@runtime_checkable
class Startable(Protocol):
    """A probe that can load before it is asked to run, and before the reference has run."""

    def start(self, *, detail: bool = False) -> None:
        """Loads, for a run with or without `detail`."""

    def refer(self, reference: Capture) -> None:
        """Takes the reference's run."""


@runtime_checkable
class Beginnable(Protocol):
    """A probe that can run, in a process of its own, before its tensors are asked for."""

    def begin(self, inputs: Inputs) -> None:
        """Starts a run; `run` on the same mapping hands over what it found."""


def _inner(probe: Probe) -> object:
    return getattr(probe, "probe", probe)


def read_inputs(inputs: Given | None, config: Config, sources: Sequence[object] = ()) -> Inputs:
    """The tensors by input name that `inputs`, or else the configuration, names; none where neither does and
    all `sources` are captures, which ran before.

    Raises:
        InputError: neither names any, they cannot be read, or are no mapping of tensors or arrays.
    """
    if inputs is None:
        if config.inputs is None:
            if sources and all(is_capture(source, config) for source in sources):
                return {}
            raise InputError(
                "no inputs: give --inputs FILE (.safetensors, .npz, FILE.py:FUNC), "
                "or set inputs in divergence.toml"
            )
        inputs = config.inputs
    return load_inputs(str(inputs), config.base) if isinstance(inputs, str | Path) else as_inputs(inputs)


def record(
    probe: Probe,
    inputs: Inputs,
    path: Path,
    *,
    detail: bool,
    progress: Progress,
    budget: Budget | None = None,
    arrived: Arrived | None = None,
    mask: str | None = None,
    **run: Any,
) -> Capture:
    """Runs `probe` into a capture at `path`, or into memory (`divergence.recording.CaptureWriter`); `mask` as
    for `token_masks`."""
    digesting = Digesting(inputs)
    with CaptureWriter(path, budget=budget, arrived=arrived) as writer:

        def sink(seen: Observation) -> None:
            writer(seen)
            digesting.begin()  # a device has enough to do by now

        facts = probe.run(inputs, sink, detail=detail, progress=progress, **run)
        inner = _inner(probe)
        if isinstance(inner, RecordedProbe):  # inputs need not be there
            masks, digest = inner.capture.token_masks(), inner.capture.inputs_digest
        else:
            masks, digest = token_masks(inputs, facts.stacks, mask), digesting.result()
        for stack, valid in masks.items():
            writer.add_mask(stack, valid)
        return writer.close(facts, digest)
