"""Captures: the tensors of one run on disk, with where they came from.

A capture is a folder: `manifest.json` and safetensors shards. It is written as the run goes into
`NAME.partial` beside its destination, and renamed when complete, so that a folder of the
capture's own name is always a whole one and an interrupted one is recognised.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from divergence.errors import CaptureError, ConfigurationError, one_line
from divergence.precision import dtype_name
from divergence.probes import Observation, RunFacts
from divergence.sites import Site, in_execution_order

if TYPE_CHECKING:
    import torch

SCHEMA = 1
MANIFEST = "manifest.json"
PARTIAL = ".partial"
REPLACED = ".replaced"
MASK_PREFIX = "mask:"
SHARD_BYTES = 64 << 20
WORD = 8
"""Size of what `fingerprint` combines, in bytes."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a capture, as its manifest describes it."""

    site: Site
    file: str
    dtype: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    found: str


@dataclass(frozen=True)
class Capture:
    """A finished capture, opened for reading. Tensors are memory-mapped when asked for.

    Attributes:
        path: the folder.
        facts: what the run was.
        inputs_digest: digest of the inputs it ran on (`divergence.inputs.digest`).
        entries: the tensors by site, in execution order.
        masks: names of the token masks stored (`""` for the default, else by stack).
    """

    path: Path
    facts: RunFacts
    inputs_digest: str
    entries: Mapping[Site, Entry]
    masks: Mapping[str, str]
    # The shard that was read last, kept open: neighbours lie in it, and opening it costs more than they.
    _last: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites in execution order."""
        return tuple(self.entries)

    def tensor(self, site: Site) -> torch.Tensor:
        """The tensor at `site`, memory-mapped.

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

    def _read(self, file: str, name: str) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            shard = self._last.get(file)
            if shard is None:
                self._last.clear()
                shard = self._last[file] = safe_open(self.path / file, framework="pt")
            tensor: torch.Tensor = shard.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CaptureError(
                f"{self.path / file}: cannot read '{name}' ({one_line(error)}); record the capture again"
            ) from error
        return tensor


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
    return path.with_name(path.name + PARTIAL)


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


class CaptureWriter:
    """Writes a capture as the run goes; holds at most one shard in memory.

    Use as a context manager and call `close` inside it. Leaving it without `close` (an exception,
    a kill) leaves `NAME.partial` behind only if the process itself died; an exception removes it.

    Args:
        path: folder to make. An existing capture there is replaced when the new one is complete.
        shard_bytes: size at which a shard is written out, in bytes.

    Raises:
        CaptureError: the folder cannot be made, or exists and is no capture.
    """

    def __init__(self, path: str | os.PathLike[str], *, shard_bytes: int = SHARD_BYTES) -> None:
        self.path = Path(path)
        self._partial = partial_of(self.path)
        self._shard_bytes = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._entries: dict[Site, Entry] = {}
        self._files: dict[str, int] = {}
        self._masks: dict[str, str] = {}
        self._closed = False
        if (
            self.path.exists()
            and not (self.path / MANIFEST).is_file()
            and (not self.path.is_dir() or any(self.path.iterdir()))
        ):
            raise CaptureError(f"{self.path}: exists and is not a capture; choose another --out")
        try:
            if self._partial.exists():
                shutil.rmtree(self._partial)
            self._partial.mkdir(parents=True)
        except OSError as error:
            raise CaptureError(f"{self._partial}: cannot be made ({one_line(error)})") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._closed:
            shutil.rmtree(self._partial, ignore_errors=True)

    def __call__(self, observation: Observation) -> None:
        """Takes one observation (a `divergence.probes.Sink`); a later one of the same site
        replaces the earlier.

        Raises:
            CaptureError: the disk is full.
        """
        site = observation.site
        self._store(str(site), observation.tensor)
        tensor = observation.tensor
        self._entries[site] = Entry(
            site,
            self._shard_name(),
            dtype_name(tensor.dtype),
            tuple(tensor.shape),
            observation.axes,
            observation.found,
        )
        self._flush_if_full()

    def add_mask(self, stack: str, mask: torch.Tensor) -> None:
        """Stores the valid-token mask `[batch, token]` (bool) of `stack`, `""` for all others."""
        self._store(MASK_PREFIX + stack, mask)
        self._masks[stack] = self._shard_name()
        self._flush_if_full()

    def close(self, facts: RunFacts, inputs_digest: str) -> Capture:
        """Writes what is pending and the manifest, and moves the capture to its place.

        Raises:
            CaptureError: the disk is full, or the run produced no site.
        """
        if not self._entries:
            raise CaptureError(f"{self.path}: the run produced no sites, so there is nothing to capture")
        self._flush()
        ordered = in_execution_order(self._entries, facts.stacks)
        content = {
            "schema": SCHEMA,
            "facts": asdict(facts),
            "inputs_digest": inputs_digest,
            "sites": [{**asdict(self._entries[s]), "site": str(s)} for s in ordered],
            "masks": self._masks,
            "files": self._files,
        }
        try:
            with open(self._partial / MANIFEST, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            self._replace()
        except OSError as error:
            raise self._failed(error) from error
        self._closed = True
        return open_capture(self.path)

    def _replace(self) -> None:
        # The old capture is moved, not deleted, first: a name is missing for two renames only.
        old = self.path.with_name(self.path.name + REPLACED)
        shutil.rmtree(old, ignore_errors=True)
        if self.path.exists():
            self.path.replace(old)
        self._partial.replace(self.path)
        shutil.rmtree(old, ignore_errors=True)

    def _shard_name(self) -> str:
        return f"shard-{len(self._files):04d}.safetensors"

    def _store(self, name: str, tensor: torch.Tensor) -> None:
        # A copy in any case: the observed storage may be written again by the run.
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self._pending_bytes += tensor.numel() * tensor.element_size()

    def _flush_if_full(self) -> None:
        if self._pending_bytes >= self._shard_bytes:
            self._flush()

    def _flush(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if not self._pending:
            return
        name = self._shard_name()
        try:
            save_file(self._pending, self._partial / name)
        except (OSError, SafetensorError) as error:
            raise self._failed(error) from error
        self._files[name] = (self._partial / name).stat().st_size
        self._pending = {}
        self._pending_bytes = 0

    def _failed(self, error: Exception) -> CaptureError:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        where = self._partial.parent
        if full:
            free = shutil.disk_usage(where).free
            return CaptureError(
                f"{where}: the disk is full while capturing ({free >> 20} MiB free, "
                f"{len(self._entries)} sites so far); free some space or set TMPDIR or --out elsewhere"
            )
        return CaptureError(f"{self._partial}: cannot write the capture ({one_line(error)})")


def fingerprint(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Digest of a model from its named parameters: names, shapes, dtypes and contents.

    Contents enter by the xor of all their 64-bit words, which any one change alters, and by up to 64
    evenly spaced elements, which tell a permutation from the original; reading is the only cost.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if not tensor.numel() or tensor.device.type == "meta":
            continue
        flat = tensor.detach().reshape(-1).contiguous()
        octets = flat.view(torch.uint8)
        if octets.storage_offset() % WORD:  # cannot be seen as words in place
            octets = octets.clone()
        words = octets[: octets.numel() // WORD * WORD].view(torch.int64)
        parts = [octets[words.numel() * WORD :], flat[:: -(-flat.numel() // 64)]]
        if words.numel():
            parts.append(torch.hash_tensor(words))
        for part in parts:
            digest.update(part.reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()[:16]
