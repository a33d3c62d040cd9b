"""From a device to memory or disk, while the model goes on.

Tensors are gathered on the device, several to a slot, and a slot is copied on a stream of its own into
page-locked memory: into what threads empty (`Staging.send`), or into memory that the tensors stay in
(`Staging.keep`). The model's stream waits for nothing; its thread waits only where no slot is free.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from divergence.shards import pieces

if TYPE_CHECKING:
    import torch

SLOT_BYTES = 16 << 20
"""Most bytes of a slot: key, value and hidden state of 970 tokens of 2048 channels in fp32 fit into one."""

SLOTS = 6

WRITERS = 4
"""Threads that empty slots."""

SHEETS = (4 << 20, 32 << 20)
"""Bytes of the first piece of page-locked memory that tensors stay in, and of the largest: each is twice as
large as the one before."""

_ALIGNED = 64
_FULL = 4
"""A slot is on its way as soon as a tensor ends beyond this part of it."""


class Copying(Protocol):
    """A copy that was started; a CUDA event is one."""

    def query(self) -> bool:
        """Whether it is there."""

    def synchronize(self) -> None:
        """Waits until it is there."""


class Copier(Protocol):
    """Copies from a device into page-locked memory."""

    def buffer(self, nbytes: int) -> torch.Tensor:
        """A buffer (`uint8`) on the CPU that `start` can copy into."""

    def start(
        self, source: torch.Tensor, buffer: torch.Tensor, streams: Iterable[torch.cuda.Stream]
    ) -> Copying:
        """Starts to copy `source` into `buffer`, both flat `uint8` of one size, once what `streams` have to
        do by now is done. Nobody writes into `source` before the copy is there."""


class Receiver(Protocol):
    """Takes the bytes of a tensor in order, always on the same thread."""

    def expect(self, nbytes: int) -> None:
        """Told that so many more bytes are on their way, or not told. Memory that nobody has written into
        yet, and new parts of files, take the system several times as long as what goes into them; this is
        the time for that."""

    def __call__(self, octets: torch.Tensor) -> None:
        """Takes the next bytes (flat `uint8` on the CPU), which it must not keep."""


class CudaCopier:
    """Copies on a CUDA stream beside the model's, one for each device."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def buffer(self, nbytes: int) -> torch.Tensor:
        """See `Copier`."""
        import torch

        with torch.inference_mode(mode=False):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def start(
        self, source: torch.Tensor, buffer: torch.Tensor, streams: Iterable[torch.cuda.Stream]
    ) -> Copying:
        """See `Copier`."""
        import torch

        device = source.device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        side = self._streams[device]
        for stream in streams:
            side.wait_stream(stream)
        with torch.cuda.stream(side):
            buffer.copy_(source, non_blocking=True)
            copied = torch.cuda.Event(blocking=True)
            copied.record(side)
        return copied


class _Sheets:
    """Page-locked memory that tensors stay in, as long as any of those in a piece of it is there."""

    def __init__(self, buffer: Callable[[int], torch.Tensor]) -> None:
        self._buffer = buffer
        self._next = SHEETS[0]
        self._sheet: torch.Tensor | None = None
        self._used = 0

    def rest(self, nbytes: int) -> torch.Tensor:
        """What is left of the last piece, of another if that is less than `nbytes`."""
        if self._sheet is None or self._used + nbytes > self._sheet.numel():
            # torch rounds page-locked memory up to powers of two.
            self._sheet = self._buffer(max(self._next, 1 << (nbytes - 1).bit_length()))
            self._next = min(2 * self._next, SHEETS[1])
            self._used = 0
        return self._sheet[self._used :]

    def take(self, nbytes: int) -> None:
        """Takes the first bytes of the rest."""
        self._used = _aligned(self._used + nbytes)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED


@dataclass
class _Slot:
    """Memory on every device that has sent tensors through it, and page-locked memory for those that do not
    stay in memory of their own."""

    size: int
    host: torch.Tensor | None = None
    devices: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    def on(self, device: torch.device) -> torch.Tensor:
        """Its memory on `device`."""
        import torch

        if device not in self.devices:
            self.devices[device] = torch.empty(self.size, dtype=torch.uint8, device=device)
        return self.devices[device]


@dataclass
class _Batch:
    """What goes through a slot at a time.

    Attributes:
        slot, device: where it is gathered.
        host: page-locked memory that it is copied into.
        stays: whether it stays there.
        writer: the thread that it goes to.
        used: bytes of the slot.
        streams: those on which it was gathered; a model may use several.
        parts: where the bytes lie, and who takes them.
        done: called when all was taken.
    """

    slot: _Slot
    device: torch.device
    host: torch.Tensor
    stays: bool
    writer: int
    used: int = 0
    streams: set[torch.cuda.Stream] = field(default_factory=set)
    parts: list[tuple[int, int, Receiver]] = field(default_factory=list)
    done: list[Callable[[], None]] = field(default_factory=list)

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether there is room for a tensor."""
        room = min(self.slot.size, self.host.numel())
        return tensor.device == self.device and _aligned(self.used) + tensor.nbytes <= room

    def gather(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Puts a tensor, whatever its strides, into the slot, at the speed of the device's memory. Returns
        where it begins and ends."""
        import torch

        if tensor.is_cuda:
            self.streams.add(torch.cuda.current_stream(tensor.device))
        start = _aligned(self.used)
        self.used = start + tensor.nbytes
        there = self.slot.on(self.device)[start : self.used]
        there.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return start, self.used


class Staging:
    """Brings tensors from a device to their receivers, on threads, or into memory that they stay in.

    Args:
        copier: copies from the device.
        memory: bytes that all slots together may take, here and on each device; there is at least one. What
            stays is not counted.

    Attributes:
        allocated: bytes of all slots.
    """

    def __init__(self, copier: Copier, memory: int) -> None:
        self.allocated = 0
        self._copier = copier
        self._size = max(1, min(SLOT_BYTES, memory // SLOTS))
        self._room = max(1, min(SLOTS, memory))
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        self._sheets = _Sheets(copier.buffer)
        self._open: _Batch | None = None
        self._writer = -1
        self._failed: BaseException | None = None
        self._under_way: dict[int, tuple[threading.Thread, queue.SimpleQueue[Callable[[], None] | None]]] = {}

    def send(
        self,
        tensor: torch.Tensor,
        receiver: Callable[[int], Receiver],
        done: Callable[[], None] = lambda: None,
    ) -> None:
        """Sends a tensor. The model may go on, and write into it, as soon as this returns.

        Args:
            tensor: on the device.
            receiver: gives what takes its bytes in order, on the thread of that number, below `WRITERS`; what
                one thread takes arrives in the order it was sent in.
            done: called afterwards, on that thread.

        Raises:
            BaseException: whatever a receiver raised before.
        """
        self._raise()
        small = tensor.nbytes <= self._size
        writer: int | None = None
        for part in (tensor,) if small else pieces(tensor, self._size):
            batch = self._batch(part, stays=False, writer=writer)
            if writer is None:
                writer, receive = batch.writer, receiver(batch.writer)
            batch.parts.append((*batch.gather(part), receive))
        self._sent(batch, done)

    def keep(
        self, tensor: torch.Tensor, done: Callable[[torch.Tensor], None] = lambda _: None
    ) -> torch.Tensor | None:
        """Sends a tensor into memory that it stays in. The model may go on, and write into it, as soon as
        this returns.

        Args:
            tensor: on the device.
            done: called when it is there, on a thread.

        Returns:
            The tensor, contiguous on the CPU; it is whole when `done` is called, or after `close`. None where
            it is larger than a slot.

        Raises:
            BaseException: whatever a receiver, or what was called when it was done, raised before.
        """
        self._raise()
        if tensor.nbytes > self._size:
            return None
        batch = self._batch(tensor, stays=True)
        start, stop = batch.gather(tensor)
        kept = batch.host[start:stop].view(tensor.dtype).view(tensor.shape)
        self._sent(batch, lambda: done(kept))
        return kept

    def _sent(self, batch: _Batch, done: Callable[[], None]) -> None:
        batch.done.append(done)
        if batch.used * _FULL >= self._size:
            self._flush()

    def close(self, last: Callable[[int], None] = lambda _: None) -> None:
        """Waits until everything has been received.

        Args:
            last: called on every thread that took something, with its number, when it has taken everything.

        Raises:
            BaseException: whatever a receiver or `last` raised.
        """
        self._flush()
        for writer, (_, tasks) in self._under_way.items():
            tasks.put(functools.partial(last, writer))
        self.abandon()
        self._raise()

    def abandon(self) -> None:
        """`close` without an error; what is not under way yet is not received."""
        self._open = None
        for thread, tasks in self._under_way.values():
            if thread.is_alive():
                tasks.put(None)
        for thread, _ in self._under_way.values():
            thread.join()

    def _batch(self, part: torch.Tensor, *, stays: bool, writer: int | None = None) -> _Batch:
        """One with room for `part`; that of `writer` if it is not None."""
        batch = self._open
        fits = batch is not None and batch.stays is stays and writer in (None, batch.writer)
        if batch is not None and fits and batch.takes(part):
            return batch
        self._flush()
        slot = self._slot()
        if stays:
            # Nothing is left to do but to wait, for which one thread will do.
            self._open = _Batch(slot, part.device, self._sheets.rest(part.nbytes), stays, writer=0)
            return self._open
        if writer is None:
            writer = self._writer = (self._writer + 1) % WRITERS
        if slot.host is None:
            slot.host = self._copier.buffer(self._size)
        self._open = _Batch(slot, part.device, slot.host, stays, writer)
        return self._open

    def _slot(self) -> _Slot:
        if self._free.empty() and self._room:
            self._room -= 1
            self.allocated += self._size
            return _Slot(self._size)
        return self._free.get()

    def _flush(self) -> None:
        """Has the batch that is open on its way."""
        batch, self._open = self._open, None
        if batch is not None:
            if batch.stays:
                self._sheets.take(batch.used)
            source = batch.slot.on(batch.device)[: batch.used]
            copying = self._copier.start(source, batch.host[: batch.used], batch.streams)
            self._tasks(batch.writer).put(lambda: self._receive(batch, copying))

    def _tasks(self, writer: int) -> queue.SimpleQueue[Callable[[], None] | None]:
        """What the thread of that number has to do; it starts with the first."""
        if writer not in self._under_way:
            tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
            thread = threading.Thread(
                target=self._work, args=(tasks,), name=f"capture-writer-{writer}", daemon=True
            )
            self._under_way[writer] = thread, tasks
            thread.start()
        return self._under_way[writer][1]

    def _receive(self, batch: _Batch, copying: Copying) -> None:
        try:
            if self._failed is None and not copying.query():
                for start, stop, receive in batch.parts:
                    receive.expect(stop - start)
            copying.synchronize()
            for start, stop, receive in batch.parts:
                if self._failed is None:
                    receive(batch.host[start:stop])
        finally:
            self._free.put(batch.slot)
        if self._failed is None:
            for done in batch.done:
                done()

    def _work(self, tasks: queue.SimpleQueue[Callable[[], None] | None]) -> None:
        while (task := tasks.get()) is not None:
            try:
                task()
            except BaseException as error:
                # The model's thread is told when it sends the next one; slots go round until then.
                self._failed = self._failed or error

    def _raise(self) -> None:
        if self._failed is not None:
            raise self._failed
