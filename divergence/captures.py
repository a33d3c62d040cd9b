"""Captures: the tensors of one run, with where they came from.

A capture is a folder: `manifest.json` and safetensors shards. It is written as the run goes into
`NAME.partial` beside its destination, and renamed when complete, so that a folder of the
capture's own name is always a whole one and an interrupted one is recognised. `divergence.recording`
writes captures; those that are not to be kept stay in memory as far as they fit.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from divergence.errors import CaptureError, ConfigurationError, one_line
from divergence.precision import integers_of
from divergence.probes import RunFacts
from divergence.shards import Shard, Span
from divergence.sites import Site

if TYPE_CHECKING:
    import torch

SCHEMA = 1
MANIFEST = "manifest.json"
PARTIAL = ".partial"
MASK_PREFIX = "mask:"
WORD = 8
"""Size of what `fingerprint` combines, in bytes."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a capture, as its manifest describes it; `file` is "" where it is in memory."""

    site: Site
    file: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    found: str


@dataclass(frozen=True)
class Capture:
    """A finished capture, opened for reading. Tensors on disk are memory-mapped when asked for.

    Attributes:
        path: the folder; there is none where all tensors are in memory.
        facts: what the run was.
        inputs_digest: digest of the inputs it ran on (`divergence.inputs.digest`).
        entries: the tensors by site, in execution order.
        masks: files of the token masks (`""` for the default, else by stack).
        held: the tensors and masks in memory, by name.
    """

    path: Path
    facts: RunFacts
    inputs_digest: str
    entries: Mapping[Site, Entry]
    masks: Mapping[str, str]
    held: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    # The shard that was read last, kept open: neighbours lie in it, and opening it costs more than they.
    _last: dict[str, Shard] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites in execution order."""
        return tuple(self.entries)

    def tensor(self, site: Site) -> torch.Tensor:
        """The tensor at `site`, in memory or memory-mapped. Nothing may be written into it.

        Raises:
            CaptureError: the shard cannot be read.
            KeyError: there is no such site.
        """
        return self._read(self.entries[site].file, str(site))

    def mask(self, stack: str) -> torch.Tensor | None:
        """The valid-token mask `[batch, token]` (bool) of `stack`, or None where all are valid."""
        name = stack if stack in self.masks else ""
        if name not in self.masks:
            return None
        return self._read(self.masks[name], MASK_PREFIX + name)

    def token_masks(self) -> dict[str, torch.Tensor]:
        """All token masks, by stack (`""` for the default)."""
        return {stack: self._read(file, MASK_PREFIX + stack) for stack, file in self.masks.items()}

    def span(self, site: Site) -> Span | None:
        """Where the tensor at `site` lies on disk, or None where it is in memory.

        Raises:
            CaptureError: the shard cannot be read.
        """
        file, name = self.entries[site].file, str(site)
        return None if name in self.held else self._shard(file, name).span(name)

    def _read(self, file: str, name: str) -> torch.Tensor:
        held = self.held.get(name)
        return self._shard(file, name).tensor(name) if held is None else held

    def _shard(self, file: str, name: str) -> Shard:
        """The shard that holds `name`."""
        shard = self._last.get(file)
        if shard is None:
            try:
                shard = Shard(self.path / file)
                shard.span(name)
            except (OSError, ValueError, KeyError, TypeError, ConfigurationError) as error:
                raise CaptureError(
                    f"{self.path / file}: cannot read '{name}' ({one_line(error)}); record the capture again"
                ) from error
            self._last.clear()
            self._last[file] = shard
        return shard


def open_capture(path: str | os.PathLike[str]) -> Capture:
    """Opens a finished capture, on the disk or at a URL (`divergence.storage`).

    Raises:
        CaptureError: there is none, it was interrupted, is empty, damaged, or of another schema.
        StorageError: the URL cannot be read.
    """
    if isinstance(path, str) and "://" in path:
        from divergence.storage import located, open_remote

        place = located(path)
        return open_remote(place) if isinstance(place, str) else open_capture(place)
    folder = Path(path)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise CaptureError(_why_not_open(folder))
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        schema = content["schema"]
        if schema != SCHEMA:
            raise CaptureError(
                f"{folder}: capture schema {schema}, this version reads {SCHEMA}; record it again"
            )
        capture = _from_manifest(folder, content)
        files = dict(content["files"])
        if unlisted := {entry.file for entry in capture.entries.values()} - files.keys():
            raise CaptureError(f"{manifest}: does not list {min(unlisted)}; record the capture again")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigurationError) as error:
        raise CaptureError(
            f"{manifest}: not a capture manifest ({one_line(error)}); record the capture again"
        ) from error
    if not capture.entries:
        raise CaptureError(f"{folder}: the capture is empty: its run found no sites; record it again")
    for file, size in files.items():
        found = (folder / file).stat().st_size if (folder / file).is_file() else None
        if found != size:
            state = "missing" if found is None else f"{found} bytes"
            raise CaptureError(
                f"{folder / file}: {state} instead of {size} bytes: the capture is damaged; "
                "copy or record it again"
            )
    return capture


def partial_of(path: Path) -> Path:
    """The folder that a capture is written into until it is complete and becomes `path`."""
    named = path if path.name else path.absolute()  # "." has a name of its own only then
    return named.parent / (named.name + PARTIAL)


def _why_not_open(folder: Path) -> str:
    partial = partial_of(folder)
    if folder.name.endswith(PARTIAL) or partial.is_dir():
        return (
            f"{folder if folder.name.endswith(PARTIAL) else partial}: this capture was interrupted "
            "while it was written and cannot be used; delete it and run `divergence capture` again"
        )
    if not folder.exists():
        return f"{folder}: no such capture; make one with `divergence capture SRC --out {folder}`"
    if folder.is_dir() and not any(folder.iterdir()):
        return f"{folder}: the capture is empty; make one with `divergence capture SRC --out {folder}`"
    return f"{folder}: not a capture (no {MANIFEST} in it); make one with `divergence capture`"


def _from_manifest(folder: Path, content: Mapping[str, Any]) -> Capture:
    facts = dict(content["facts"])
    for name in ("stacks", "notes", "outputs"):
        facts[name] = tuple(facts[name])
    entries = {}
    for item in content["sites"]:
        site = Site.parse(item["site"])
        entries[site] = Entry(
            site, item["file"], item["dtype"], tuple(item["shape"]), tuple(item["axes"]), item["found"]
        )
    return Capture(folder, RunFacts(**facts), content["inputs_digest"], entries, dict(content["masks"]))


def fingerprint(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Digest of a model from its named parameters: names, shapes, dtypes and contents.

    Contents enter by the xor of all their 64-bit words, which any one change alters, and by up to 64
    evenly spaced elements, which tell a permutation from the original; reading is the only cost.
    """
    return fingerprint_started(named)()


def fingerprint_started(
    named: Iterable[tuple[str, torch.Tensor]], after: Sequence[torch.cuda.Event] = ()
) -> Callable[[], str]:
    """As `fingerprint`, of weights as they are now; what is returned gives it. Weights on a device are read
    there without waiting; what they come to is fetched once, when it is asked for.

    Args:
        named: the parameters.
        after: what was recorded on each device that holds some; they are read after that, and beside what
            the device does since, which must leave them alone until the digest is there.
    """
    import torch

    digested: list[tuple[bytes, list[torch.Tensor]]] = []
    streams = [torch.cuda.Stream(event.device) for event in after]
    with contextlib.ExitStack() as beside:
        for stream, event in zip(streams, after, strict=True):
            stream.wait_event(event)
            beside.enter_context(torch.cuda.stream(stream))
        beside.enter_context(torch.inference_mode())  # views of parameters cost half without gradients
        for name, tensor in named:
            header = f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode()
            empty = not tensor.numel() or tensor.device.type == "meta"
            digested.append((header, [] if empty else _digests(tensor)))
        order, together = _brought_together(digested)
    return functools.partial(_fetched, order, together, streams)


Kind = tuple["torch.device", "torch.dtype"]


def _brought_together(
    digested: Sequence[tuple[bytes, Sequence[torch.Tensor]]],
) -> tuple[list[bytes | tuple[Kind, int, int]], dict[Kind, torch.Tensor]]:
    """Headers in order, each before where its parts lie (first and last byte), and copies of all parts of a
    device and dtype in one tensor, which keeps what may be written into."""
    import torch

    order: list[bytes | tuple[Kind, int, int]] = []
    parts: dict[Kind, list[torch.Tensor]] = {}
    filled: Counter[Kind] = Counter()
    for header, own in digested:
        order.append(header)
        for part in own:
            kind = part.device, part.dtype
            start = filled[kind]
            filled[kind] += part.nbytes
            order.append((kind, start, filled[kind]))
            parts.setdefault(kind, []).append(part)
    return order, {kind: torch.cat(own) for kind, own in parts.items()}


def _fetched(
    order: Iterable[bytes | tuple[Kind, int, int]],
    together: Mapping[Kind, torch.Tensor],
    streams: Sequence[torch.cuda.Stream],
) -> str:
    import torch

    for stream in streams:
        stream.synchronize()
    octets = {kind: held.cpu().view(torch.uint8).numpy().data for kind, held in together.items()}
    digest = hashlib.sha256()
    for item in order:
        digest.update(item if isinstance(item, bytes) else octets[item[0]][item[1] : item[2]])
    return digest.hexdigest()[:16]


def _digests(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What of the contents of a tensor enters its model's digest, some of it as views."""
    import torch

    flat = tensor.reshape(-1).contiguous()
    sampled = flat[:: -(-flat.numel() // 64)]
    if flat.itemsize > WORD or not tensor.is_contiguous():
        sampled = sampled.clone()  # a view would keep a copy of the whole tensor
    # Integers, which any device can put together.
    parts = [sampled.view(integers_of(min(flat.itemsize, WORD)))]
    if not any(count * flat.itemsize % WORD for count in (flat.numel(), flat.storage_offset())):
        words = flat.view(torch.int64)
    else:
        octets = flat.view(torch.uint8)
        if octets.storage_offset() % WORD:  # cannot be seen as words in place
            octets = octets.clone()
        words = octets[: octets.numel() // WORD * WORD].view(torch.int64)
        parts.insert(0, octets[words.numel() * WORD :].clone())
    if words.numel():
        parts.append(torch.hash_tensor(words).view(torch.int64).reshape(1))
    return [part for part in parts if part.numel()]
