"""What the layers of a candidate add to the error: the results of a replay (`divergence.replay`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from divergence.comparison.metrics import Metrics
    from divergence.noise import Floor
    from divergence.sites import Site


@dataclass(frozen=True)
class Introduced:
    """What a layer added.

    Attributes:
        metrics: candidate against the reference's layer on the candidate's input.
        floor: error of that layer itself in the candidate's precision, on the same input.
    """

    metrics: Metrics
    floor: Floor

    @property
    def ratio(self) -> float | None:
        """Introduced error over floor."""
        return self.floor.ratio(self.metrics)


@dataclass(frozen=True)
class ReplayResult:
    """Introduced errors by site, and what could not be replayed, in words."""

    introduced: Mapping[Site, Introduced]
    notes: tuple[str, ...] = ()
