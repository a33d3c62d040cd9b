"""Candidate against reference, site by site: while the candidate runs, and afterwards from memory or disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

from divergence.comparison import compare_tensors
from divergence.masks import valid_tokens
from divergence.shards import ReadAhead
from divergence.sites import matches
from divergence.working import cores

if TYPE_CHECKING:
    from torch import Tensor

    from divergence.alignment import Pair
    from divergence.captures import Capture, Entry
    from divergence.comparison.metrics import Metrics
    from divergence.sites import Site

AHEAD_BYTES = 128 << 20
"""Bytes that are read ahead of the comparison, where no budget says less."""


class Meanwhile:
    """Compares on a thread what a candidate hands over while it still runs.

    Only sites whose partner is certain: the same site of the same shape. Whether that is how they are
    paired in the end is for `take` to check. And only where a core is free for it, because the candidate
    runs on a device or leaves one: threads of a model wait for each other, and one that has to share its
    core holds up all of them. Use as a context manager.

    Args:
        reference: the reference's run.
        exclude: patterns of sites not to compare.
    """

    def __init__(self, reference: Capture, exclude: Sequence[str] = ()) -> None:
        self._reference = reference
        self._exclude = exclude
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="compare-meanwhile")
        self._found: dict[Site, tuple[Tensor, Future[Metrics]]] = {}
        self._spare = _spare_core()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, entry: Entry, tensor: Tensor, from_device: bool) -> None:  # noqa: FBT001 - a callback
        """Takes a tensor that stays in memory (`divergence.recording.Arrived`)."""
        if not (from_device or self._spare):
            return
        site = entry.site
        known = self._reference.entries.get(site)
        if known is None or known.shape != entry.shape or any(matches(site, p) for p in self._exclude):
            return
        self._found[site] = tensor, self._pool.submit(self._compare, site, tensor)

    def take(self, pair: Pair, candidate: Capture) -> Metrics | None:
        """The figures of `pair`, or None where they are not those of just these two tensors."""
        site = pair.reference
        if site != pair.candidate or pair.layout.steps or site not in self._found:
            return None
        tensor, metrics = self._found[site]
        return metrics.result() if candidate.tensor(site) is tensor else None

    def _compare(self, site: Site, tensor: Tensor) -> Metrics:
        ref = self._reference.tensor(site)
        axes = self._reference.entries[site].axes
        return compare_tensors(ref, tensor, axes=axes, mask=valid_tokens(self._reference, site, ref))


def _spare_core() -> bool:
    """Whether torch leaves a core of this process alone."""
    import torch

    return torch.get_num_threads() < cores()


def compare_pair(pair: Pair, reference: Capture, candidate: Capture) -> Metrics:
    """The candidate's tensor of `pair`, in the reference's layout, against the reference's."""
    site = pair.reference
    ref = reference.tensor(site)
    cand = pair.layout.apply(candidate.tensor(pair.candidate))
    axes = reference.entries[site].axes
    return compare_tensors(ref, cand, axes=axes, mask=valid_tokens(reference, site, ref))


def compare_pairs(
    pairs: Sequence[Pair],
    reference: Capture,
    candidate: Capture,
    *,
    memory: int,
    meanwhile: Meanwhile | None = None,
) -> Mapping[Site, Metrics]:
    """All pairs in order; the disk reads ahead.

    Args:
        pairs: of sites of both captures.
        memory: bytes; captures with more than this on disk are not left in the system's cache.
        meanwhile: what was compared before.
    """
    known = {pair.reference: meanwhile.take(pair, candidate) if meanwhile else None for pair in pairs}
    left = [pair for pair in pairs if known[pair.reference] is None]
    sides = [(reference.span(pair.reference), candidate.span(pair.candidate)) for pair in left]
    groups = [[span for span in spans if span is not None] for spans in sides]
    on_disk = sum(span.stop - span.start for group in groups for span in group)
    distance = min(AHEAD_BYTES, memory)
    with ReadAhead(groups, distance=distance, drop=on_disk > memory) as ahead:
        for number, pair in enumerate(left):
            known[pair.reference] = compare_pair(pair, reference, candidate)
            ahead.done(number)
    return {site: metrics for site, metrics in known.items() if metrics is not None}
