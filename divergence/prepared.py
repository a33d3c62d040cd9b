"""The reference after its one run: what every candidate that is compared with it shares."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from divergence.alignment import align
from divergence.comparing import compare_pair
from divergence.comparison import on_device
from divergence.config import Config
from divergence.errors import ConfigurationError
from divergence.inputs import Given
from divergence.masks import valid_tokens
from divergence.noise import Floor, emulated, measure
from divergence.probes import Progress
from divergence.setting import (
    Options,
    Setting,
    begin,
    comparison_loading,
    getting_ready,
    one_core_spared,
    read_inputs,
)
from divergence.sites import patterns_of
from divergence.sources import open_source
from divergence.thresholds import Thresholds, with_thresholds
from divergence.working import quiet_collector, working_folder

if TYPE_CHECKING:
    from divergence.captures import Capture
    from divergence.probes import Probe
    from divergence.probes.pytorch import PyTorchProbe
    from divergence.reference_cache import ReferenceCache
    from divergence.sites import Site


@dataclass(frozen=True)
class Reference:
    """A reference that was run and captured.

    Attributes:
        capture: of its run.
        pytorch: its probe after a run with `record=True`, or None where it is no PyTorch module.
        floors: noise floors by precision with how they were taken, filled in when first asked for.
    """

    capture: Capture
    pytorch: PyTorchProbe | None
    floors: dict[str, tuple[Mapping[Site, Floor], str]] = field(default_factory=dict)


@contextlib.contextmanager
def prepared(
    ref: object,
    cands: Sequence[object],
    inputs: Given | None,
    *,
    config: Config,
    options: Options,
    tolerance: Thresholds | None,
    exclude: str | Sequence[str],
    keep: Path | None,
    progress: Progress,
    references: ReferenceCache | None = None,
) -> Iterator[tuple[Setting, Reference]]:
    """What the comparisons of one command work with, while the first candidate gets ready; arguments as
    of `divergence.compare`.

    Raises:
        DivergenceError: the inputs cannot be read, or the reference cannot be run.
    """
    judged = config.tolerance
    if tolerance is not None:
        judged = with_thresholds(judged, tolerance, "tolerance")
    excluded = (*config.exclude, *patterns_of(exclude))
    sources = [ref, *cands, *([] if options.floor is None else [options.floor])]
    with (
        getting_ready(cands, config, options) as early,
        working_folder(keep) as folder,
        quiet_collector(),
    ):
        setting = Setting(
            config,
            options,
            read_inputs(inputs, config, sources),
            judged,
            excluded,
            folder,
            progress,
            early,
            references=references,
            keep=keep is not None,
        )
        begin(early, setting.inputs)
        with one_core_spared(early):
            probe = open_source(ref, config)
        pytorch = as_pytorch(probe)
        gpu = pytorch.device if pytorch is not None and pytorch.on_cuda else None
        with contextlib.ExitStack() as comparing:
            comparing.enter_context(comparison_loading("cpu" if gpu is None else "cuda"))
            if gpu is not None:
                comparing.enter_context(on_device(gpu))
            with one_core_spared(early):
                reference = prepare(probe, setting)
            yield setting, reference


def prepare(probe: Probe, setting: Setting) -> Reference:
    """Runs the reference once and captures it, unless `setting.references` knows its run.

    Raises:
        DivergenceError: it cannot be run.
    """
    pytorch = as_pytorch(probe)
    if setting.references is not None and pytorch is not None and pytorch is probe:
        known = setting.references.prepare(pytorch, setting)
        if known is not None:
            return known
    for_replay: dict[str, Any] = {"record": True} if pytorch else {}
    capture = setting.record(probe, "reference", **for_replay)
    return Reference(capture, pytorch)


def floors_of(reference: Reference, precision: str, setting: Setting) -> tuple[Mapping[Site, Floor], str]:
    """The noise floors of the reference in `precision`, and how they were taken, in words. They are taken
    once.

    Raises:
        ConfigurationError: the reference is no PyTorch module, and no other source of floors was given.
        SourceError: the reference cannot run in that precision.
    """
    if precision not in reference.floors:
        if setting.options.floor is not None:
            reference.floors[precision] = _given(reference, precision, setting)
        else:
            reference.floors[precision] = _measured(reference, precision, setting)
    return reference.floors[precision]


def _measured(reference: Reference, precision: str, setting: Setting) -> tuple[Mapping[Site, Floor], str]:
    capture = reference.capture
    if reference.pytorch is None:
        raise ConfigurationError(
            f"{capture.facts.source}: only a PyTorch reference can be run in {precision} for the noise "
            "floor; give --floor SRC, or judge by absolute limits (--tolerance rel_l2=1e-2)"
        )
    floors = measure(
        reference.pytorch,
        setting.inputs,
        capture,
        precision,
        lambda site, tensor: valid_tokens(capture, site, tensor),
        detail=setting.options.detail,
        progress=setting.progress,
    )
    return floors, f"the reference run in {emulated(capture.facts.precision, precision)}"


def _given(reference: Reference, precision: str, setting: Setting) -> tuple[Mapping[Site, Floor], str]:
    capture, options = reference.capture, setting.options
    probe = open_source(options.floor, setting.config, reference=capture, memory=options.under_way)
    setting.check_same_inputs(probe, capture)
    taken = setting.record(probe, "floor")
    floors = {
        pair.reference: Floor.of(compare_pair(pair, capture, taken), precision)
        for pair in align(capture.entries, taken.entries).pairs
    }
    return floors, f"given: {taken.facts.source}"


def as_pytorch(probe: Probe) -> PyTorchProbe | None:
    """The PyTorch probe that `probe` is or wraps, or None."""
    from divergence.probes.pytorch import PyTorchProbe

    inner = getattr(probe, "probe", probe)
    return inner if isinstance(inner, PyTorchProbe) else None
