"""Keys and values that a model itself returns, against those that its layers were seen with."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from divergence.probes import Observation, Sink
from divergence.probes.pytorch.returned import ByLayer, Stacked, keys_by_layer, keys_stacked
from divergence.probes.pytorch.stacks import Stack
from divergence.sites import HEAD_AXES, Site
from divergence.taken_over import found_in, note_on

_TENSORS = frozenset({"key", "value", "cross_key", "cross_value"})
# Names by which other forms of the model, such as an ONNX file, show the same tensors at the same sites.
_SHOWN = re.compile(r"(^|_)(keys?|k_cache|key_cache)$|(present|past|cache).*\*.*\bk(ey)?s?$", re.IGNORECASE)


@dataclass(frozen=True)
class _Seen:
    """A key or value as it was observed in the last call of its layer; `lengths` of a key's tokens."""

    site: Site
    shape: torch.Size
    digest: Digest
    lengths: Tensor | None


@dataclass(frozen=True)
class _Reading:
    """What a model returned, read as the keys or values of the layers of `stack`; `whole` where they are
    the parts of one tensor, along its first axis."""

    stack: str
    tensor: str
    name: str
    layers: Mapping[int, Tensor]
    found: str
    whole: Tensor | None = None


class OwnKeys:
    """Keys and values that the model itself returns take precedence over what attention reads:
    a cache may hold them before the rotary embedding, or hold what attention never read.

    Args:
        stacks: the model's.
        sink: receives what is handed over again.
    """

    def __init__(self, stacks: tuple[Stack, ...], sink: Sink) -> None:
        self._stacks = {stack.name: len(stack.layers) for stack in stacks}
        self._sink = sink
        self._seen: dict[tuple[str, str, int], _Seen] = {}

    def saw(self, seen: Observation) -> None:
        """Notes a digest of a key or value as it was observed."""
        site = seen.site
        if site.layer is not None and site.tensor in _TENSORS:
            address = site.stack, site.tensor, site.layer
            turned = site.tensor == "key" and seen.tensor.is_floating_point()
            lengths = _lengths(seen.tensor) if turned else None
            self._seen[address] = _Seen(site, seen.tensor.shape, _hash(seen.tensor), lengths)

    def replace(self, outputs: Any) -> tuple[str, ...]:
        """Hands over again the keys and values among the model's outputs that differ from what was
        observed. Returns what to note."""
        by_layer, stacked = keys_by_layer(outputs), keys_stacked(outputs)
        # Of several that are outputs of their own, which one is the cache is not known; they are compared
        # as outputs.
        plain = Counter([x.tensor for x in by_layer if not x.aside] + [x.tensor for x in stacked])
        found = [self._by_layer(x) for x in by_layer if x.aside or plain[x.tensor] == 1]
        found += [self._stacked(x) for x in stacked if plain[x.tensor] == 1]
        return tuple(note for readings in found for note in self._take(list(readings)))

    def _by_layer(self, kept: ByLayer) -> Iterator[_Reading]:
        """`kept` as layers of each stack that it fits: other shapes are another layout, or a window."""
        for stack, count in self._stacks.items():
            fitting = {
                layer: tensor
                for layer, tensor in kept.layers.items()
                if (seen := self._seen.get((stack, kept.tensor, layer))) and seen.shape == tensor.shape
            }
            if count == kept.count and fitting:
                yield _Reading(stack, kept.tensor, kept.name, fitting, found_in(kept.name))

    def _stacked(self, kept: Stacked) -> Iterator[_Reading]:
        """`kept` as layers of each stack that it fits. Where attention showed no heads, a stack of them
        is more than what was seen."""
        for stack, count in self._stacks.items():
            for axis in (1, 0, 2):
                if kept.layers.shape[axis] != count:
                    continue
                whole = kept.layers.movedim(axis, 0)
                layers = dict(enumerate(whole.unbind()))
                seen = [self._seen.get((stack, kept.tensor, layer)) for layer in layers]
                shapes = {s.shape for s in seen if s is not None and len(s.shape) == len(HEAD_AXES)}
                if shapes <= {layers[0].shape}:
                    found = found_in(kept.name, axis)
                    yield _Reading(stack, kept.tensor, kept.name, layers, found, whole)

    def _take(self, readings: list[_Reading]) -> Iterator[str]:
        """Hands over what differs in the likeliest of `readings`: the one of which most was seen, and of
        several stacks the one that attends to another, for that is the one with a cache."""
        if not readings:
            return
        same = [self._same(reading) for reading in readings]
        ranks = [
            (sum(equal), (reading.stack, "cross_key", 0) in self._seen)
            for reading, equal in zip(readings, same, strict=True)
        ]
        best = max(ranks)
        if len({r.stack for r, rank in zip(readings, ranks, strict=True) if rank == best}) > 1:
            return
        reading, equal = readings[ranks.index(best)], same[ranks.index(best)]
        if not any(equal) and self._only_turned(reading):
            yield (
                f"the keys in the model's output '{reading.name}' are turned against those that reach "
                "attention, as before a rotary embedding; the latter are compared"
            )
            return
        for (layer, tensor), known in zip(reading.layers.items(), equal, strict=True):
            if not known:
                seen = self._seen.get((reading.stack, reading.tensor, layer))
                site = seen.site if seen else Site(layer, reading.tensor, reading.stack)
                self._sink(Observation(site, tensor, HEAD_AXES, reading.found))
        if not all(equal):
            yield note_on(reading.tensor, len(equal) - sum(equal), reading.name)

    def _only_turned(self, reading: _Reading) -> bool:
        """Whether the keys of all layers are as long as those seen, token by token, under a name that says
        nothing to other forms of the model: these show what reaches attention."""
        if reading.tensor != "key" or _SHOWN.search(reading.name):
            return False
        for layer, tensor in reading.layers.items():
            seen = self._seen.get((reading.stack, reading.tensor, layer))
            if seen is None or seen.lengths is None or seen.shape != tensor.shape:
                return False
            lengths = _lengths(tensor).to(seen.lengths.device)
            if not torch.allclose(lengths, seen.lengths, rtol=_ROUNDED, equal_nan=True):
                return False
        return True

    def _same(self, reading: _Reading) -> list[bool]:
        """For each layer of `reading` whether it is what was seen. A device is waited for once for all layers
        of one shape."""
        seen = {
            layer: seen
            for layer, tensor in reading.layers.items()
            if (seen := self._seen.get((reading.stack, reading.tensor, layer))) and seen.shape == tensor.shape
        }
        alike: dict[tuple[torch.device, torch.Size], list[int]] = {}
        for layer in seen:
            tensor = reading.layers[layer]
            alike.setdefault((tensor.device, tensor.shape), []).append(layer)
        answers: dict[int, bool] = {}
        for (device, shape), layers in alike.items():
            if reading.whole is not None and len(layers) == len(reading.layers):
                held = _hash(reading.whole)
            else:
                held = _together([_hash(reading.layers[layer]) for layer in layers], device)
            before = _together([seen[layer].digest for layer in layers], device)
            equal = _matching(before, held)
            if len(shape) == len(HEAD_AXES) and shape[1] == shape[2]:
                # The shape leaves open which axis goes over heads and which over tokens.
                turned = [_hash(reading.layers[layer].transpose(1, 2)) for layer in layers]
                equal = equal | _matching(before, _together(turned, device))
            answers.update(zip(layers, equal.tolist(), strict=True))
        return [answers.get(layer, False) for layer in reading.layers]


Digest = tuple[Tensor, Tensor]
_ROUNDED = 1e-2  # relative; of a length in bf16 at most


def _lengths(key: Tensor) -> Tensor:
    """Length of the key of every head and token, which no rotation changes."""
    wide = torch.promote_types(key.dtype, torch.float32)
    lengths: Tensor = torch.linalg.vector_norm(key, dim=-1, dtype=wide)
    return lengths


def _hash(tensor: Tensor) -> Digest:
    """Digests of the bits along each of the last two axes: torch's hash is an exclusive or, which a
    permutation along one axis alone would leave unchanged. They stay on the tensor's device, which is
    not waited for."""
    rows, columns = (torch.hash_tensor(tensor, dim=axis).view(torch.int64) for axis in (-1, -2))
    return rows, columns


def _together(digests: Sequence[Digest], device: torch.device) -> Digest:
    """Digests of several tensors of one shape as one, along a first axis."""
    rows, columns = (torch.stack([part.to(device) for part in parts]) for parts in zip(*digests, strict=True))
    return rows, columns


def _matching(one: Digest, other: Digest) -> Tensor:
    """Which of several digests are equal."""
    rows, columns = ((a == b).flatten(1).all(1) for a, b in zip(one, other, strict=True))
    return rows & columns
