"""Probes: each runs one kind of source on inputs and hands over the tensors at its sites.

To add a runtime, implement `Probe` and register its kind in `divergence.sources`; the shared
contract suite in `tests/probes/contract.py` tells whether it behaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from divergence.sites import Site

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Observation:
    """The tensor that a run produced at a site.

    Attributes:
        site: where.
        tensor: what; any dtype, device or strides. Whoever receives it must copy what it keeps:
            the storage may be written again when the receiver returns.
        axes: name of each axis of `tensor` in order, from `batch`, `head`, `token`, `channel`;
            empty where unknown (model outputs).
        found: how the site was found, for people ("cache", "exporter metadata, node add_5").
    """

    site: Site
    tensor: torch.Tensor
    axes: tuple[str, ...] = ()
    found: str = ""


Sink = Callable[[Observation], None]
"""Receives every observation of a run, in the order in which they become known."""

Progress = Callable[[str, int, int], None]
"""Told what is going on: label, steps done, steps in all (0 where unknown)."""


def silent(label: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing."""


EMBEDDING, HEAD = "embedding", "head"
"""What of a model lies before its layers, and behind them."""


@dataclass(frozen=True)
class RunFacts:
    """What a run was, beside its tensors.

    Attributes:
        kind: `pytorch`, `onnx`, `tensorrt`, `recorded`, ...
        source: the source as the user named it.
        model_digest: identifies the model's structure and weights.
        precision: one of `divergence.precision.PRECISIONS` as the source shows it, or None.
        stacks: names of the layer stacks in execution order.
        versions: versions of the libraries that ran it.
        notes: remarks that belong into a report, each one sentence.
        unseen_inf: sites whose fp16 tensor shows Inf that no consumer of it saw, with the
            reason in words.
        outputs: names of the model's own outputs in order.
        details: facts of this kind of source (provider, opset, ...), JSON values only.
        mixed: where it is not the same everywhere, the precision of each layer by its name (`layers.3`), of
            `EMBEDDING` and of `HEAD`.
    """

    kind: str
    source: str
    model_digest: str
    precision: str | None = None
    stacks: tuple[str, ...] = ("",)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unseen_inf: Mapping[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    mixed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteInfo:
    """A site that a source has: how it was found, and what is known of its tensor without a run."""

    site: Site
    found: str
    dtype: str = ""
    shape: tuple[int | str, ...] = ()


@dataclass(frozen=True)
class Description:
    """What `divergence inspect` shows of a source."""

    source: str
    kind: str
    precision: str | None
    sites: tuple[SiteInfo, ...]
    inputs: Mapping[str, str]
    notes: tuple[str, ...] = ()
    operators: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """For every operator type, how many run in which dtype."""
    contract: Mapping[str, Any] = field(default_factory=dict)
    """What an engine says that it runs in (`divergence.probes.tensorrt.contract`)."""


@runtime_checkable
class Probe(Protocol):
    """Runs a source. An instance belongs to one source and may run several times."""

    @property
    def kind(self) -> str:
        """Short name of the runtime."""

    def describe(self, inputs: Mapping[str, torch.Tensor] | None = None) -> Description:
        """The sites of the source and how each is found.

        Args:
            inputs: needed by sources that can only be understood by running them (PyTorch).

        Raises:
            SourceError: the source cannot be read.
            InputError: it needs inputs and got none, or inputs that do not fit.
        """

    def run(
        self,
        inputs: Mapping[str, torch.Tensor],
        sink: Sink,
        *,
        detail: bool = False,
        progress: Progress = silent,
    ) -> RunFacts:
        """Runs the source once on `inputs` and hands every site's tensor to `sink`.

        Args:
            inputs: tensors by input name.
            sink: called once per site; a second observation of a site replaces the first.
            detail: also the sites of `divergence.sites.DETAIL_TENSORS`.
            progress: told about long work.

        Raises:
            SourceError: the source cannot be read or run, or has no layer stack.
            InputError: `inputs` do not fit (names, dtypes, shapes).
        """
