"""Records the tensors of a run: those that fit the budget stay in memory, the others go to disk.

Tensors on the CPU are written from where they lie; those of a device come through `divergence.staging`,
so that neither a whole tensor nor a whole shard is held beside the model.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from divergence.budget import Budget
from divergence.captures import MANIFEST, MASK_PREFIX, SCHEMA, Capture, Entry, partial_of
from divergence.errors import CaptureError, counted, one_line
from divergence.lanes import Filling, Lane, Shards
from divergence.precision import dtype_name
from divergence.probes import Observation, RunFacts
from divergence.shards import DTYPES, pieces
from divergence.sites import Site, in_execution_order
from divergence.staging import WRITERS, Copier, CudaCopier, Receiver, Staging

if TYPE_CHECKING:
    import torch

REPLACED = ".replaced"
SHARD_BYTES = 64 << 20
STAGED = 96 << 20
"""Bytes of page-locked buffers, where no budget says less."""

PIECE = 8 << 20
"""Most bytes of a tensor with gaps that are brought together at a time."""


Arrived = Callable[[Entry, "torch.Tensor", bool], None]
"""Told of a tensor that stays in memory as soon as all of it is there, on any thread, and whether it came
from a device."""


class CaptureWriter:
    """Records a capture as the run goes.

    Use as a context manager and call `close` inside it. Leaving it without `close` (an exception,
    a kill) leaves `NAME.partial` behind only if the process itself died; an exception removes it.

    Args:
        path: folder to make. An existing capture there is replaced when the new one is complete.
        shard_bytes: size at which a shard is complete, in bytes.
        budget: memory that tensors may stay in; what does not fit goes to `path`, which is then no
            capture of its own. Without one, all goes to disk.
        arrived: told of tensors that stay in memory.
        copier: how tensors come from a device.

    Raises:
        CaptureError: the folder has no name, cannot be made, or exists and is no capture.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        shard_bytes: int = SHARD_BYTES,
        budget: Budget | None = None,
        arrived: Arrived | None = None,
        copier: Copier | None = None,
    ) -> None:
        self.path = Path(path)
        self._partial = partial_of(self.path)
        self._budget = budget
        self._arrived = arrived
        self._copier = copier
        self._entries: dict[Site, Entry] = {}
        self._masks: list[str] = []
        self._held: dict[str, torch.Tensor] = {}
        self._taken = 0
        self._shards = Shards(self._partial, shard_bytes)
        self._direct = Lane(self._shards)
        self._staged = [Lane(self._shards) for _ in range(WRITERS)]
        self._lane_of: dict[str, Lane] = {}
        self._staging: Staging | None = None
        self._closed = False
        if not self.path.name:
            raise CaptureError(f"{self.path}: a capture is a folder of its own; choose another --out")
        if (
            self.path.exists()
            and not (self.path / MANIFEST).is_file()
            and (not self.path.is_dir() or any(self.path.iterdir()))
        ):
            raise CaptureError(f"{self.path}: exists and is not a capture; choose another --out")
        if budget is None:
            self._shards.make_folder()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._staging is not None:
            self._staging.abandon()
        # Whoever still holds this as its sink, if only in a cycle, shall hold no buffers by it.
        self._staging = None
        if not self._closed:
            self._shards.abandon()
            self._give(self._taken)
            shutil.rmtree(self._partial, ignore_errors=True)
        self._held = {}

    def __call__(self, observation: Observation) -> None:
        """Takes one observation (a `divergence.probes.Sink`); a later one of the same site
        replaces the earlier.

        Raises:
            CaptureError: the disk is full, or the dtype is one that no capture can hold.
        """
        site, tensor = observation.site, observation.tensor.detach()
        dtype = dtype_name(tensor.dtype)
        if dtype not in DTYPES:
            raise CaptureError(f"{site}: a capture cannot hold tensors of dtype {dtype}; exclude the site")
        entry = Entry(site, "", dtype, tuple(tensor.shape), observation.axes, observation.found)
        self._entries[site] = entry
        self._store(str(site), tensor, entry)

    def add_mask(self, stack: str, mask: torch.Tensor) -> None:
        """Stores the valid-token mask `[batch, token]` (bool) of `stack`, `""` for all others."""
        self._masks.append(stack)
        self._store(MASK_PREFIX + stack, mask, None)

    def close(self, facts: RunFacts, inputs_digest: str) -> Capture:
        """Writes what is pending and the manifest, and moves the capture to its place.

        Raises:
            CaptureError: the disk is full, or the run produced no site.
        """
        if not self._entries:
            raise CaptureError(f"{self.path}: the run produced no sites, so there is nothing to capture")
        ordered = in_execution_order(self._entries, facts.stacks)
        # Text is made while the last tensors are written: what comes after them is waited for.
        head = _members({"schema": SCHEMA, "facts": asdict(facts), "inputs_digest": inputs_digest})
        rows = {site: _row(self._entries[site]) for site in ordered}
        with self._naming_failures():
            if self._staging is not None:
                self._staging.close(lambda writer: self._staged[writer].close())
            self._direct.close()
        entries = {site: replace(self._entries[site], file=self._file_of(str(site))) for site in ordered}
        masks = {stack: self._file_of(MASK_PREFIX + stack) for stack in self._masks}
        with self._naming_failures():
            if self._budget is None:
                items = [f'{row}, "file": {json.dumps(entries[site].file)}}}' for site, row in rows.items()]
                tail = _members({"masks": masks, "files": self._shards.files})
                sites = '"sites": [\n' + ",\n".join(items) + "\n]"
                text = "{\n" + ",\n".join([*head, sites, *tail]) + "\n}\n"
                (self._partial / MANIFEST).write_text(text, encoding="utf-8")
            if self._shards.files or self._budget is None:
                self._replace()
        self._closed = True
        return Capture(self.path, facts, inputs_digest, entries, masks, self._held)

    def _file_of(self, name: str) -> str:
        return self._lane_of[name].files[name] if name in self._lane_of else ""

    def _replace(self) -> None:
        # The old capture is moved, not deleted, first: a name is missing for two renames only.
        old = self.path.with_name(self.path.name + REPLACED)
        shutil.rmtree(old, ignore_errors=True)
        if self.path.exists():
            self.path.replace(old)
        self._partial.replace(self.path)
        shutil.rmtree(old, ignore_errors=True)

    def _store(self, name: str, tensor: torch.Tensor, entry: Entry | None) -> None:
        self._forget(name)
        if self._copier is None and tensor.device.type not in ("cpu", "cuda"):
            tensor = tensor.cpu()  # a device without streams of CUDA
        nbytes = tensor.numel() * tensor.element_size()
        if self._budget is not None and self._budget.take(nbytes):
            self._taken += nbytes
            self._hold(name, tensor, entry)
        elif self._on_cpu(tensor):
            self._lane_of[name] = self._direct
            with self._naming_failures():
                receive = self._direct.receiver(name, tensor.dtype, tuple(tensor.shape))
                for piece in pieces(tensor, PIECE):
                    receive(piece)
        else:

            def receiver(writer: int) -> Receiver:
                lane = self._lane_of[name] = self._staged[writer]
                return lane.receiver(name, tensor.dtype, tuple(tensor.shape))

            self._send(tensor, receiver)

    def _on_cpu(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu"

    def _forget(self, name: str) -> None:
        """Makes room again for what a later observation replaces."""
        self._lane_of.pop(name, None)
        held = self._held.pop(name, None)
        # One that lies in a piece of page-locked memory with others stays as long as they do.
        if held is not None and held.untyped_storage().nbytes() == held.nbytes:
            self._give(held.nbytes)

    def _give(self, nbytes: int) -> None:
        if self._budget is not None:
            self._budget.give(nbytes)
            self._taken -= nbytes

    def _hold(self, name: str, tensor: torch.Tensor, entry: Entry | None) -> None:
        import torch

        def arrived(held: torch.Tensor) -> None:
            if self._arrived is not None and entry is not None:
                self._arrived(entry, held, not on_cpu)

        on_cpu = self._on_cpu(tensor)
        # A probe runs in inference mode; what it leaves behind is an ordinary tensor.
        with torch.inference_mode(mode=False), torch.no_grad():
            if on_cpu:
                held = self._held[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
                held.copy_(tensor)
                arrived(held)
                return
            with self._naming_failures():
                kept = self._from_device().keep(tensor, arrived)
            if kept is not None:
                self._held[name] = kept
                return
            large = self._held[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            receive = Filling(large)
            self._send(tensor, lambda _: receive, lambda: arrived(large))

    def _send(
        self,
        tensor: torch.Tensor,
        receiver: Callable[[int], Receiver],
        done: Callable[[], None] = lambda: None,
    ) -> None:
        with self._naming_failures():
            self._from_device().send(tensor, receiver, done)

    def _from_device(self) -> Staging:
        if self._staging is None:
            memory = STAGED if self._budget is None else min(STAGED, self._budget.under_way)
            self._staging = Staging(self._copier or CudaCopier(), memory)
        return self._staging

    @contextlib.contextmanager
    def _naming_failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> CaptureError:
        where = self._partial.parent
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(where).free
            return CaptureError(
                f"{where}: the disk is full while capturing ({free >> 20} MiB free, "
                f"{counted(len(self._entries), 'site')} so far); free some space or set "
                "TMPDIR or --out elsewhere"
            )
        return CaptureError(f"{self._partial}: cannot write the capture ({one_line(error)})")


def _members(content: Mapping[str, object]) -> list[str]:
    """Members of a JSON object, each a line."""
    return [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]


def _row(entry: Entry) -> str:
    """A site of the manifest without its file, which is known last, and without the bracket after it."""
    known = {name: value for name, value in vars(entry).items() if name != "file"}
    return json.dumps({**known, "site": str(entry.site)})[:-1]
