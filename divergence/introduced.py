"""What the layers of a candidate add to the error: the results of a replay (`divergence.replay`)."""

from __future__ import annotations

from collections import Counter
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


def mixed_note(mixed: Mapping[str, str], coarsest: str, *, by_part: bool) -> str:
    """What to say of a candidate whose parts run in different precisions.

    Args:
        mixed: precision by part (`divergence.probes.RunFacts`).
        coarsest: of them.
        by_part: whether each part is judged by its own.
    """
    counts = Counter(mixed.values())
    usual = max(counts, key=lambda precision: counts[precision])
    others: dict[str, list[str]] = {}
    for part, precision in mixed.items():
        if precision != usual:
            others.setdefault(precision, []).append(part)
    said = [
        f"in {precision} in {', '.join(parts[:_NAMED])}"
        + (f" and {len(parts) - _NAMED} more" if len(parts) > _NAMED else "")
        for precision, parts in others.items()
    ]
    judged = (
        "each part is judged by its own precision"
        if by_part
        else f"all are judged by the coarsest, {coarsest}, for nothing was replayed"
    )
    return f"the candidate runs {' and '.join(said)}, and in {usual} elsewhere: {judged}"


_NAMED = 4
