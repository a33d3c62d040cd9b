"""From a device to memory or disk, while the model goes on.

Tensors are copied on a stream of their own into a few page-locked buffers, which threads empty. The
model's stream waits for nothing; its thread waits only where no buffer is free.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from divergence.shards import pieces

if TYPE_CHECKING:
    import torch

BUFFER_BYTES = 8 << 20
"""Size of a buffer: a hidden state of 970 tokens of 2048 channels in fp32 fits into one."""

BUFFERS = 8

WRITERS = 4
"""Threads that empty buffers: one writes to memory that is new, or to a file, at 2 to 3 GB/s, and a model of
one layer after another fills buffers as fast."""


class Copier(Protocol):
    """Copies from a device into page-locked memory."""

    def buffer(self, nbytes: int) -> torch.Tensor:
        """A buffer (`uint8`) on the CPU that `start` can copy into."""

    def start(self, source: torch.Tensor, buffer: torch.Tensor) -> Callable[[], None]:
        """Starts to copy `source` into `buffer`, both flat `uint8` of one size.

        Returns:
            What waits until the copy is there. `source` may be written as soon as `start` returns.
        """


class CudaCopier:
    """Copies on a CUDA stream beside the model's, one for each device."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def buffer(self, nbytes: int) -> torch.Tensor:
        """See `Copier`."""
        import torch

        with torch.inference_mode(mode=False):
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def start(self, source: torch.Tensor, buffer: torch.Tensor) -> Callable[[], None]:
        """See `Copier`. The model may write into the source once more: what is copied is a clone, which
        costs its own stream a copy at the speed of the device's memory."""
        import torch

        device = source.device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        side = self._streams[device]
        with torch.cuda.device(device):
            kept = source.clone()
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                buffer.copy_(kept, non_blocking=True)
                kept.record_stream(side)
                copied = torch.cuda.Event(blocking=True)
                copied.record(side)
        return copied.synchronize


Receiver = Callable[["torch.Tensor"], None]
"""Takes the next bytes of a tensor (flat `uint8` on the CPU), which it must not keep."""

_Task = Callable[[], None]


class Staging:
    """Brings tensors from a device to their receivers, on threads.

    Args:
        copier: copies from the device.
        memory: bytes that all buffers together may take; there is at least one.

    Attributes:
        allocated: bytes of all buffers.
    """

    def __init__(self, copier: Copier, memory: int) -> None:
        self.allocated = 0
        self._copier = copier
        self._size = max(1, min(BUFFER_BYTES, memory // BUFFERS))
        self._room = max(1, min(BUFFERS, memory))
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        self._failed: BaseException | None = None
        self._under_way: tuple[queue.SimpleQueue[_Task | None], ...] = tuple(
            queue.SimpleQueue() for _ in range(WRITERS)
        )
        self._threads = [
            threading.Thread(target=self._work, args=(tasks,), name="capture-writer", daemon=True)
            for tasks in self._under_way
        ]
        for thread in self._threads:
            thread.start()

    def send(
        self, tensor: torch.Tensor, receive: Receiver, done: Callable[[], None], *, writer: int = 0
    ) -> None:
        """Sends a tensor. Returns when all of it is on its way, which is when the model may go on.

        Args:
            tensor: on the device.
            receive: given its bytes in order, on a thread.
            done: called afterwards, on that thread.
            writer: which thread, below `WRITERS`; what one is sent arrives in order.

        Raises:
            BaseException: whatever a receiver raised before.
        """
        under_way = self._under_way[writer]
        for piece in pieces(tensor, self._size):
            self._raise()
            buffer = self._buffer()
            part = buffer[: piece.numel()]
            under_way.put(self._task(buffer, part, self._copier.start(piece, part), receive))
        under_way.put(lambda: done() if self._failed is None else None)

    def close(self) -> None:
        """Waits until everything has been received.

        Raises:
            BaseException: whatever a receiver raised.
        """
        self.abandon()
        self._raise()

    def abandon(self) -> None:
        """`close` without an error."""
        for thread, tasks in zip(self._threads, self._under_way, strict=True):
            if thread.is_alive():
                tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _buffer(self) -> torch.Tensor:
        if self._free.empty() and self._room:
            self._room -= 1
            self.allocated += self._size
            return self._copier.buffer(self._size)
        return self._free.get()

    def _task(self, buffer: torch.Tensor, part: torch.Tensor, wait: _Task, receive: Receiver) -> _Task:
        def run() -> None:
            try:
                wait()
                if self._failed is None:
                    receive(part)
            finally:
                self._free.put(buffer)

        return run

    def _work(self, tasks: queue.SimpleQueue[_Task | None]) -> None:
        while (task := tasks.get()) is not None:
            try:
                task()
            except BaseException as error:
                # The model's thread is told when it sends the next one; buffers go round until then.
                self._failed = self._failed or error

    def _raise(self) -> None:
        if self._failed is not None:
            raise self._failed
