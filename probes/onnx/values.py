"""Finds sites by value: tensors of the run that hold what the reference holds at a site."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from divergence.captures import Capture
from divergence.probes.onnx.found import Found
from divergence.sites import Site

# A tensor is taken for a site's if it is this close to it ...
CLOSE = 1e-2
# ... and the next different tensor is this many times further away,
MARGIN = 10.0
# unless both are so close that it makes no difference.
EQUAL = 1e-5
_CANDIDATE = 0.1  # further away nothing is remembered


@dataclass(frozen=True)
class _Near:
    """A value near to a wanted site: its distance, and how its axes stand to the site's."""

    distance: float
    value: str
    order: tuple[int, ...]
    contents: str


@dataclass
class _Wanted:
    """A site, what the reference holds there, and what has been found to be near to it.

    Attributes:
        mask: the valid tokens `[batch, token]`, if these are axes of the tensor: at padded tokens
            runtimes differ and are right to.
        valid: the tensor's contents at valid tokens.
        norm: the L2 norm of `valid`.
    """

    site: Site
    tensor: torch.Tensor
    axes: tuple[str, ...]
    mask: torch.Tensor | None
    near: list[_Near] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.valid = self._at_valid(self.tensor).float()
        self.norm = _norm(self.valid)

    def _at_valid(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.mask is None:
            return tensor
        at = (self.axes.index("batch"), self.axes.index("token")) if self.axes else (0, 1)
        return tensor.movedim(at, (0, 1))[self.mask]

    def look(self, value: str, tensor: torch.Tensor, norm: float) -> None:
        """Remembers `value` if its contents, in any order of its axes, are near to the site's."""
        if self.mask is None and not abs(norm - self.norm) <= _CANDIDATE * self.norm:
            return
        best: tuple[float, tuple[int, ...]] | None = None
        for order in itertools.permutations(range(tensor.dim())):
            if tuple(tensor.shape[i] for i in order) != tuple(self.tensor.shape):
                continue
            distance = _norm(self._at_valid(tensor.permute(order)).float() - self.valid) / self.norm
            if distance < _CANDIDATE and (best is None or distance < best[0]):
                best = (distance, order)
        if best is not None:
            contents = _contents(tensor.permute(best[1]))
            self.near.append(_Near(best[0], value, best[1], contents))

    def found(self) -> Found | None:
        """The value that is this site without doubt. Of views and copies the earliest is taken,
        one in the site's own layout before others."""
        # Stable: the earliest of equals first.
        nearest = sorted(self.near, key=lambda n: (n.distance, n.order != tuple(sorted(n.order))))
        if not nearest or nearest[0].distance >= CLOSE:
            return None
        first = nearest[0]
        others = [n for n in nearest if n.contents != first.contents and n.distance >= EQUAL]
        if others and others[0].distance < MARGIN * first.distance:
            return None
        axes = [""] * len(first.order)
        for mine, at in zip(self.axes, first.order, strict=False):
            axes[at] = mine
        named = tuple(axes) if all(axes) else ()
        how = f"by value, relative error {first.distance:.1e}, value {first.value}"
        return Found(self.site, first.value, named, how, "value")


def match_values(
    sites: Iterable[Site], reference: Capture, groups: Iterable[Mapping[str, torch.Tensor]]
) -> list[Found]:
    """Finds `sites` among the tensors of `groups` by their contents.

    Args:
        sites: sites that the reference has.
        reference: the reference's tensors.
        groups: values of the graph in topological order, in groups that fit into memory.
    """
    wanted: dict[int, list[_Wanted]] = {}
    for item in _wanted(sites, reference):
        wanted.setdefault(item.tensor.numel(), []).append(item)
    for group in groups:
        for value, tensor in group.items():
            if not tensor.is_floating_point() or tensor.numel() not in wanted:
                continue
            norm = _norm(tensor)
            for item in wanted[tensor.numel()]:
                if tensor.dim() == item.tensor.dim():
                    item.look(value, tensor, norm)
    found = (item.found() for items in wanted.values() for item in items)
    return [item for item in found if item is not None]


def sizes_wanted(sites: Iterable[Site], reference: Capture) -> set[int]:
    """Numbers of elements that `sites` have in the reference."""
    return {item.tensor.numel() for item in _wanted(sites, reference)}


def _wanted(sites: Iterable[Site], reference: Capture) -> Iterator[_Wanted]:
    for site in sites:
        tensor = reference.tensor(site)
        if not tensor.is_floating_point() or tensor.numel() < 2:
            continue
        axes = reference.entries[site].axes
        item = _Wanted(site, tensor, axes, _mask(site, tensor, axes, reference))
        # Zeros, and NaN or Inf, tell nothing apart.
        if 0 < item.norm < float("inf"):
            yield item


def _mask(site: Site, tensor: torch.Tensor, axes: tuple[str, ...], reference: Capture) -> torch.Tensor | None:
    mask = reference.mask(site.stack)
    if mask is None or tensor.dim() < 2 or (axes and not {"batch", "token"} <= set(axes)):
        return None
    at = (axes.index("batch"), axes.index("token")) if axes else (0, 1)
    fits = tuple(mask.shape) == (tensor.shape[at[0]], tensor.shape[at[1]])
    return mask if fits and bool(mask.any()) else None


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))


def _contents(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.float().contiguous().numpy().tobytes()).hexdigest()
