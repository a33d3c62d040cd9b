"""The noise floor: how far the reference itself is off when it runs in the candidate's precision."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from divergence.comparison import compare_tensors
from divergence.errors import SourceError, one_line
from divergence.precision import UNIT_ROUNDOFF
from divergence.probes import Observation, Progress, silent

if TYPE_CHECKING:
    from torch import Tensor

    from divergence.captures import Capture
    from divergence.comparison.metrics import Metrics
    from divergence.probes.pytorch import PyTorchProbe
    from divergence.sites import Site

# The reference's own rounding is judged against a run with this many more bits.
_FINER = {"fp32": "fp64", "tf32": "fp32", "fp16": "fp32", "bf16": "fp32"}

# In units of roundoff. Rounding to nearest costs 0.42 u (relative RMS, mantissas spread evenly). In fp32,
# where sums are rounded as often as what is stored, their order adds as much again, and it is the
# implementation's: a GPU and a CPU in fp32 were seen 4.5 u apart within one layer of SmolLM2.
_LEAST = {"fp32": 2.0}


@dataclass(frozen=True)
class Floor:
    """A noise floor.

    Attributes:
        rel_l2: relative L2 error of the whole tensor.
        row_rel_l2: median over tokens of the relative L2 error.
        channel_rel_l2: median over channels of the same; None where it was not taken.
        most_channels_rel_l2: what nine of ten channels are not off by more than; None where it was not taken.
        overflow: the reference itself is not finite there in this precision.
    """

    rel_l2: float
    row_rel_l2: float
    overflow: bool = False
    channel_rel_l2: float | None = None
    most_channels_rel_l2: float | None = None

    @classmethod
    def of(cls, metrics: Metrics, precision: str) -> Floor:
        """The floor that `metrics` measured, not below what computing in `precision` costs anyhow."""
        least = cls.least(precision).rel_l2
        return cls(
            max(metrics.rel_l2 or 0.0, least),
            max(metrics.row_rel_l2 or 0.0, least),
            metrics.compared < metrics.elements - metrics.ref_nonfinite,
            max(_quantile(metrics.channel, 0.5), least),
            max(_quantile(metrics.channel, _MOST), least),
        )

    @classmethod
    def least(cls, precision: str) -> Floor:
        """The least that a floor in `precision` can be, whatever a measurement would say."""
        least = _LEAST.get(precision, 0.5) * UNIT_ROUNDOFF[precision]
        return cls(least, least, channel_rel_l2=least, most_channels_rel_l2=least)

    def ratio(self, metrics: Metrics) -> float | None:
        """Error over floor, the worst of whole tensor, median token, median channel and most channels; None
        without an error. The channels count by themselves because one of 1000 times the others' size, which
        half precision rounds by as much as they hold, is nearly all of the other two norms."""
        pairs = [(metrics.rel_l2, self.rel_l2), (metrics.row_rel_l2, self.row_rel_l2)]
        if metrics.rel_l2 is not None:
            for share, floor in ((0.5, self.channel_rel_l2), (_MOST, self.most_channels_rel_l2)):
                if floor is not None:
                    pairs.append((_quantile(metrics.channel, share), floor))
        return max((error / floor for error, floor in pairs if error is not None), default=None)


def _quantile(errors: np.ndarray[Any, Any], share: float) -> float:
    """What that share of the errors that exist does not exceed; 0 where none does."""
    found = errors[~np.isnan(errors)]
    return float(np.quantile(found, share)) if found.size else 0.0


_MOST = 0.9
"""Share of the channels that a fault in a part of them is looked for in."""

_SUSPECT = 32.0
"""Times the least floor from which one may be no rounding."""

_SAME = 16.0
"""Times the least floor of its own precision up to which two runs of a reference are the same."""


MaskOf = Callable[["Site", "Tensor"], "Tensor | None"]


def emulated(reference: str | None, precision: str) -> str:
    """The precision to run the reference in for the floor of `precision`: that one, or, where the
    reference already runs in it, a finer one, whose difference is the reference's own rounding."""
    if precision == reference or (precision == "fp32" and reference in (None, "fp32")):
        return _FINER.get(precision, precision)
    return precision


def measure(
    probe: PyTorchProbe,
    inputs: Mapping[str, Tensor],
    reference: Capture,
    precision: str,
    mask_of: MaskOf,
    *,
    detail: bool = False,
    progress: Progress = silent,
) -> dict[Site, Floor]:
    """Runs the reference once more in `precision` and compares as it goes; nothing is stored.

    Raises:
        SourceError: the reference cannot run in that precision, or gives something else every time.
    """
    from divergence.emulation import cast, reduced

    run_in = emulated(reference.facts.precision, precision)
    floors: dict[Site, Floor] = {}

    def compare(seen: Observation) -> None:
        stored = seen.tensor if run_in == "fp64" else cast(seen.tensor, run_in)
        metrics = _against(reference, seen.site, stored, mask_of)
        if metrics is not None:
            floors[seen.site] = Floor.of(metrics, precision)

    layers = [layer for stack in probe.stacks for layer in stack.layers]
    moved = {name: cast(tensor, run_in) for name, tensor in inputs.items()}

    def shown(_: str, done: int, total: int) -> None:
        progress(f"noise floor: the reference in {run_in}", done, total)

    try:
        with reduced(layers, run_in, rest=probe.model):
            probe.observe(moved, compare, detail=detail, progress=shown)
    except SourceError as error:
        raise SourceError(
            f"the reference cannot run in {run_in} for the noise floor ({one_line(error)}); "
            "judge by absolute limits (--tolerance rel_l2=1e-2) or give --floor SRC"
        ) from error
    most = _SUSPECT * Floor.least(precision).rel_l2
    suspect = {site for site, floor in floors.items() if floor.rel_l2 > most}
    if suspect:
        _check_repeatable(probe, inputs, reference, suspect, mask_of, detail=detail)
    return floors


def _against(reference: Capture, site: Site, tensor: Tensor, mask_of: MaskOf) -> Metrics | None:
    """What another run of the reference gave at a site against what was captured there; None where that is
    of another shape, or nothing."""
    entry = reference.entries.get(site)
    if entry is None or entry.shape != tuple(tensor.shape):
        return None
    ref = reference.tensor(site)
    return compare_tensors(ref, tensor, axes=entry.axes, mask=mask_of(site, ref))


def _check_repeatable(
    probe: PyTorchProbe,
    inputs: Mapping[str, Tensor],
    reference: Capture,
    suspect: Collection[Site],
    mask_of: MaskOf,
    *,
    detail: bool,
) -> None:
    """Runs the reference once more as it is: what differs between two equal runs is no rounding, and as a
    floor it would hide whatever is wrong with a candidate.

    Raises:
        SourceError: it differs at one of `suspect`.
    """
    same = _SAME * Floor.least(reference.facts.precision or "fp32").rel_l2

    def compare(seen: Observation) -> None:
        if seen.site not in suspect:
            return
        metrics = _against(reference, seen.site, seen.tensor, mask_of)
        error = None if metrics is None else metrics.rel_l2
        if error is not None and not error <= same:
            raise SourceError(
                f"{probe.source}: gives something else when it is run again ({seen.site}: relative error "
                f"{error:.2g}), so nothing can be judged by it; seed what is random in its forward, and have "
                "it keep no state from call to call"
            )

    probe.observe(inputs, compare, detail=detail)
