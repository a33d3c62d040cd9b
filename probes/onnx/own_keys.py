"""Keys and values that a graph itself hands out, all layers in one, against those inside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from divergence.captures import Capture
from divergence.probes import Observation
from divergence.probes.onnx.found import Found
from divergence.sites import HEAD_AXES, Site
from divergence.stacked import role
from divergence.taken_over import found_in, note_on

# Names that say no more than that they are the keys or the values: taken at their word.
_PLAIN = re.compile(r"(^|_)(keys?|k_cache|key_cache|values?|v_cache|value_cache)$")
_CHOSEN = frozenset({"override", "name"})
_ROUNDINGS = 4


class OwnKeys:
    """Keys and values among the outputs take precedence over what attention reads, as they do where a
    PyTorch module returns them.

    Args:
        found: the sites of layers.
        outputs: the graph's outputs. One counts if the reference's output of this name holds what the
            reference's layers hold; where the reference has none, if its name is plain.
        reference: a run of the reference.

    Attributes:
        notes: what to note of the run, once it is done.
    """

    def __init__(self, found: Sequence[Found], outputs: Sequence[Found], reference: Capture | None) -> None:
        self.notes: list[str] = []
        self._held: dict[Site, Tensor] = {}
        self._sites: dict[Site, list[Site]] = {}
        for tensor in ("key", "value"):
            inside = [item for item in found if item.site.tensor == tensor]
            sites = [item.site for item in inside]
            named = [item.site for item in outputs if role(item.value) == {tensor: None}]
            plain = not sites or sites == [Site(i, tensor, sites[0].stack) for i in range(len(sites))]
            chosen = any(item.method in _CHOSEN for item in inside)
            if sites and plain and not chosen and len(named) == 1 and _counts(named[0], sites, reference):
                self._sites[named[0]] = sites
        self._wanted = {site for sites in self._sites.values() for site in sites}

    def saw(self, seen: Observation) -> Iterator[Observation]:
        """Takes what was observed. At an output that stacks keys or values, gives those that differ from
        what was observed inside."""
        if seen.site in self._wanted and set(seen.axes) == set(HEAD_AXES):
            order = [seen.axes.index(axis) for axis in HEAD_AXES]
            self._held[seen.site] = seen.tensor.permute(order).clone()
        sites = self._sites.get(seen.site, [])
        if not sites or any(site not in self._held for site in sites):
            return
        inside = [self._held.pop(site) for site in sites]
        layers = _layers(seen.tensor, inside)
        if layers is None:
            return
        axis, same = layers
        name, tensor = seen.site.tensor, sites[0].tensor
        for site, held, known in zip(sites, seen.tensor.unbind(axis), same, strict=True):
            if not known:
                yield Observation(site, held, HEAD_AXES, found_in(name, axis))
        if not all(same):
            self.notes.append(note_on(tensor, same.count(False), name))


def _counts(output: Site, sites: Sequence[Site], reference: Capture | None) -> bool:
    """Whether the output is known to hold what is compared at `sites`."""
    if reference is None or output not in reference.entries:
        return bool(_PLAIN.search(output.tensor))
    if any(site not in reference.entries for site in sites):
        return False
    layers = _layers(reference.tensor(output), [reference.tensor(site) for site in sites])
    return layers is not None and all(layers[1])


def _layers(stacked: Tensor, inside: Sequence[Tensor]) -> tuple[int, list[bool]] | None:
    """The axis along which `stacked` has the layers, and for each whether it is what is `inside`; None
    where it has no such axis. Of several axes of this size, the one that agrees most is taken."""
    axes = [axis for axis in (1, 0, 2) if stacked.dim() == 5 and stacked.shape[axis] == len(inside)]
    found = [
        (axis, [_same(*both) for both in zip(inside, stacked.unbind(axis), strict=True)]) for axis in axes
    ]
    return max(found, key=lambda layers: sum(layers[1]), default=None)


def _same(inside: Tensor, held: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of a Cast, and to heads that are repeated."""
    if inside.dim() == held.dim() == 4 and held.shape[1] and inside.shape[1] % held.shape[1] == 0:
        inside = inside[:, :: inside.shape[1] // held.shape[1]]
    if inside.shape != held.shape:
        return False
    finite = torch.isfinite(inside)
    if not torch.equal(finite, torch.isfinite(held)):
        return False
    eps = max(torch.finfo(t.dtype).eps if t.is_floating_point() else 0 for t in (inside, held))
    a, b = (torch.where(finite, t, 0).float() for t in (inside, held))
    return bool(torch.linalg.vector_norm(a - b) <= _ROUNDINGS * eps * torch.linalg.vector_norm(b))
