"""From a device to memory or disk, while the model goes on.

Tensors are copied on a stream of their own into a few page-locked buffers, which a thread empties. The
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


class Staging:
    """Brings tensors from a device to their receivers, on a thread.

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
        self._under_way: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="capture-writer", daemon=True)
        self._thread.start()

    def send(self, tensor: torch.Tensor, receive: Receiver, done: Callable[[], None]) -> None:
        """Sends a tensor. Returns when all of it is on its way, which is when the model may go on.

        Args:
            tensor: on the device.
            receive: given its bytes in order, on the thread.
            done: called afterwards, on the thread.

        Raises:
            BaseException: whatever a receiver raised before.
        """
        for piece in pieces(tensor, self._size):
            self._raise()
            buffer = self._buffer()
            part = buffer[: piece.numel()]
            self._under_way.put(self._task(buffer, part, self._copier.start(piece, part), receive))
        self._under_way.put(lambda: done() if self._failed is None else None)

    def close(self) -> None:
        """Waits until everything has been received.

        Raises:
            BaseException: whatever a receiver raised.
        """
        self.abandon()
        self._raise()

    def abandon(self) -> None:
        """`close` without an error."""
        if self._thread.is_alive():
            self._under_way.put(None)
            self._thread.join()

    def _buffer(self) -> torch.Tensor:
        if self._free.empty() and self._room:
            self._room -= 1
            self.allocated += self._size
            return self._copier.buffer(self._size)
        return self._free.get()

    def _task(
        self, buffer: torch.Tensor, part: torch.Tensor, wait: Callable[[], None], receive: Receiver
    ) -> Callable[[], None]:
        def run() -> None:
            try:
                wait()
                if self._failed is None:
                    receive(part)
            finally:
                self._free.put(buffer)

        return run

    def _work(self) -> None:
        while (task := self._under_way.get()) is not None:
            try:
                task()
            except BaseException as error:
                # The model's thread is told when it sends the next one; buffers go round until then.
                self._failed = self._failed or error

    def _raise(self) -> None:
        if self._failed is not None:
            raise self._failed
