"""Keys and values that a model itself returns, against those that its layers were seen with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from divergence.probes import Observation, Sink
from divergence.probes.pytorch.stacks import Stack
from divergence.sites import HEAD_AXES, Site

_OWN_KEYS = re.compile(r"(^|_)(keys?|k_cache|key_cache)$")
_OWN_VALUES = re.compile(r"(^|_)(values?|v_cache|value_cache)$")


class OwnKeys:
    """Keys and values that the model itself returns take precedence over what attention reads:
    a cache may hold them before the rotary embedding.

    Args:
        stacks: the model's; with several, what an output belongs to is not known, and none is taken.
        sink: receives what is handed over again.
    """

    def __init__(self, stacks: tuple[Stack, ...], sink: Sink) -> None:
        self._stack = stacks[0] if len(stacks) == 1 else None
        self._sink = sink
        self._seen: dict[Site, tuple[torch.Size, Digest]] = {}

    def saw(self, seen: Observation) -> None:
        """Notes a digest of a key or value as it was observed."""
        if self._stack is not None and seen.site.tensor in ("key", "value"):
            self._seen[seen.site] = (seen.tensor.shape, _hash(seen.tensor))

    def replace(self, leaves: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Hands over again the keys and values among the model's outputs `leaves` that differ from what
        was observed. Returns what to note."""
        if self._stack is None:
            return ()
        notes = []
        for tensor, pattern in (("key", _OWN_KEYS), ("value", _OWN_VALUES)):
            names = [n for n in leaves if pattern.search(n) and leaves[n].dim() == 5]
            if len(names) != 1:
                continue
            stacked = leaves[names[0]]
            count = len(self._stack.layers)
            axes = [axis for axis in (1, 0, 2) if stacked.shape[axis] == count]
            if not axes:
                continue
            sites = [Site(layer, tensor, self._stack.name) for layer in range(count)]
            layers = stacked.movedim(axes[0], 0)
            same = _same([self._seen.get(site) for site in sites], layers)
            differing = count - sum(same)
            for site, held, known in zip(sites, layers.unbind(), same, strict=True):
                if known:
                    continue
                found = f"model output '{names[0]}', layer along axis {axes[0]}"
                self._sink(Observation(site, held, HEAD_AXES, found))
            if differing:
                notes.append(
                    f"the {tensor} of {differing} layers is taken from the model's output '{names[0]}', "
                    "which differs from what reaches attention"
                )
        return tuple(notes)


Digest = tuple[Tensor, Tensor]


def _hash(tensor: Tensor) -> Digest:
    """Digests of the bits along each of the last two axes: torch's hash is an exclusive or, which a
    permutation along one axis alone would leave unchanged. They stay on the tensor's device, which is
    not waited for."""
    rows, columns = (torch.hash_tensor(tensor, dim=axis).view(torch.int64) for axis in (-1, -2))
    return rows, columns


def _same(seen: Sequence[tuple[torch.Size, Digest] | None], held: Tensor) -> list[bool]:
    """For each layer of `held` whether it is what was seen. The device is waited for once."""
    known = {i: layer[1] for i, layer in enumerate(seen) if layer is not None and layer[0] == held.shape[1:]}
    if not known:
        return [False] * len(seen)
    equal = torch.ones(len(known), dtype=torch.bool, device=held.device)
    for part, digest in enumerate(_hash(held)):
        before = torch.stack([layer[part].to(held.device) for layer in known.values()])
        equal &= (before == digest[list(known)]).flatten(1).all(1)
    answers = dict(zip(known, equal.tolist(), strict=True))
    return [answers.get(i, False) for i in range(len(seen))]
