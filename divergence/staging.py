"""From a device to memory or disk, while the model goes on.

Tensors are gathered on the device, several to a slot, and a slot is copied on a stream of its own into
page-locked memory, which threads empty. The model's stream waits for nothing; its thread waits only where
no slot is free.
"""

from __future__ import annotations

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


@dataclass
class _Slot:
    """Page-locked memory, and as much on every device that has sent tensors through it."""

    host: torch.Tensor
    devices: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    def on(self, device: torch.device) -> torch.Tensor:
        """Its memory on `device`."""
        import torch

        if device not in self.devices:
            self.devices[device] = torch.empty(self.host.numel(), dtype=torch.uint8, device=device)
        return self.devices[device]


@dataclass
class _Batch:
    """What goes through a slot at a time.

    Attributes:
        slot, device: where it is gathered.
        writer: the thread that it goes to.
        used: bytes of the slot.
        streams: those on which it was gathered; a model may use several.
        parts: where the bytes lie, and who takes them.
        done: called when all was taken.
    """

    slot: _Slot
    device: torch.device
    writer: int
    used: int = 0
    streams: set[torch.cuda.Stream] = field(default_factory=set)
    parts: list[tuple[int, int, Receiver]] = field(default_factory=list)
    done: list[Callable[[], None]] = field(default_factory=list)

    def takes(self, tensor: torch.Tensor, size: int) -> bool:
        """Whether there is room for a tensor in a slot of `size` bytes."""
        return tensor.device == self.device and self._start + tensor.nbytes <= size

    def gather(self, tensor: torch.Tensor, receive: Receiver) -> None:
        """Puts a tensor, whatever its strides, into the slot, at the speed of the device's memory."""
        import torch

        if tensor.is_cuda:
            self.streams.add(torch.cuda.current_stream(tensor.device))
        start = self._start
        self.used = start + tensor.nbytes
        there = self.slot.on(self.device)[start : self.used]
        there.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        self.parts.append((start, self.used, receive))

    @property
    def _start(self) -> int:
        return -(-self.used // _ALIGNED) * _ALIGNED


class Staging:
    """Brings tensors from a device to their receivers, on threads.

    Args:
        copier: copies from the device.
        memory: bytes that all slots together may take, here and on each device; there is at least one.

    Attributes:
        allocated: bytes of all slots.
    """

    def __init__(self, copier: Copier, memory: int) -> None:
        self.allocated = 0
        self._copier = copier
        self._size = max(1, min(SLOT_BYTES, memory // SLOTS))
        self._room = max(1, min(SLOTS, memory))
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        self._open: _Batch | None = None
        self._writer = -1
        self._failed: BaseException | None = None
        self._under_way: tuple[queue.SimpleQueue[Callable[[], None] | None], ...] = tuple(
            queue.SimpleQueue() for _ in range(WRITERS)
        )
        self._threads = [
            threading.Thread(target=self._work, args=(tasks,), name="capture-writer", daemon=True)
            for tasks in self._under_way
        ]
        for thread in self._threads:
            thread.start()

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
            batch = self._batch(part, writer)
            if writer is None:
                writer, receive = batch.writer, receiver(batch.writer)
            batch.gather(part, receive)
        batch.done.append(done)
        if batch.used * _FULL >= self._size:
            self._flush()

    def close(self) -> None:
        """Waits until everything has been received.

        Raises:
            BaseException: whatever a receiver raised.
        """
        self._flush()
        self.abandon()
        self._raise()

    def abandon(self) -> None:
        """`close` without an error; what is not under way yet is not received."""
        self._open = None
        for thread, tasks in zip(self._threads, self._under_way, strict=True):
            if thread.is_alive():
                tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _batch(self, part: torch.Tensor, writer: int | None) -> _Batch:
        """One with room for `part`; that of `writer` if it is not None."""
        batch = self._open
        if batch is not None and batch.takes(part, self._size) and writer in (None, batch.writer):
            return batch
        self._flush()
        if writer is None:
            writer = self._writer = (self._writer + 1) % WRITERS
        self._open = _Batch(self._slot(), part.device, writer)
        return self._open

    def _slot(self) -> _Slot:
        if self._free.empty() and self._room:
            self._room -= 1
            self.allocated += self._size
            return _Slot(self._copier.buffer(self._size))
        return self._free.get()

    def _flush(self) -> None:
        """Has the batch that is open on its way."""
        batch, self._open = self._open, None
        if batch is not None:
            source, buffer = batch.slot.on(batch.device), batch.slot.host
            copying = self._copier.start(source[: batch.used], buffer[: batch.used], batch.streams)
            self._under_way[batch.writer].put(lambda: self._receive(batch, copying))

    def _receive(self, batch: _Batch, copying: Copying) -> None:
        try:
            if self._failed is None and not copying.query():
                for start, stop, receive in batch.parts:
                    receive.expect(stop - start)
            copying.synchronize()
            for start, stop, receive in batch.parts:
                if self._failed is None:
                    receive(batch.slot.host[start:stop])
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
