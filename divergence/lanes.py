"""Where the bytes of a capture go: shards, of which every thread that writes has its own, or memory."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from divergence.errors import CaptureError, one_line
from divergence.shards import ShardWriter

if TYPE_CHECKING:
    import torch

    from divergence.staging import Receiver


class Shards:
    """The shards of a capture.

    Attributes:
        files: sizes of those that are complete, by name, in bytes.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.shard_bytes = shard_bytes
        self.files: dict[str, int] = {}
        self._folder = folder
        self._made = False
        self._open: list[ShardWriter] = []
        self._lock = threading.Lock()

    def make_folder(self) -> None:
        """Makes the folder, once.

        Raises:
            CaptureError: it cannot be made.
        """
        if self._made:
            return
        try:
            if self._folder.exists():
                shutil.rmtree(self._folder)
            self._folder.mkdir(parents=True)
        except OSError as error:
            raise CaptureError(f"{self._folder}: cannot be made ({one_line(error)})") from error
        self._made = True

    def open(self) -> ShardWriter:
        """The next shard."""
        with self._lock:
            self.make_folder()
            name = f"shard-{len(self.files) + len(self._open):04d}.safetensors"
            shard = ShardWriter(self._folder / name)
            self._open.append(shard)
            return shard

    def complete(self, shard: ShardWriter) -> None:
        """Completes a shard."""
        size = shard.close()
        with self._lock:
            self._open.remove(shard)
            self.files[shard.path.name] = size

    def abandon(self) -> None:
        """Closes whatever is open."""
        for shard in self._open:
            shard.abandon()


class Lane:
    """Writes tensors one after another into shards of its own; a lane belongs to one thread.

    Attributes:
        files: name of the shard by name of the tensor.
    """

    def __init__(self, shards: Shards) -> None:
        self.files: dict[str, str] = {}
        self._shards = shards
        self._shard: ShardWriter | None = None

    def receiver(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Receiver:
        """What takes the bytes of the next tensor, in pieces."""
        return Writing(self, name, dtype, shape)

    def expect(self, nbytes: int) -> None:
        """Makes room for what is going to be written, unless it goes to the next shard."""
        if self._shard is None:
            self._shard = self._shards.open()
        if self._shard.nbytes + nbytes <= self._shards.shard_bytes:
            self._shard.expect(nbytes)

    def write(self, octets: torch.Tensor) -> None:
        """Appends bytes to the tensor that began last."""
        assert self._shard is not None
        self._shard.write(octets)

    def close(self) -> None:
        """Completes the shard that is open."""
        if self._shard is not None:
            self._shards.complete(self._shard)
            self._shard = None

    def begin(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Begins a tensor, in the next shard where this one is full."""
        shard = self._shard
        if shard is None or shard.nbytes >= self._shards.shard_bytes or not shard.begin(name, dtype, shape):
            self.close()
            shard = self._shard = self._shards.open()
            if not shard.begin(name, dtype, shape):
                raise CaptureError(f"{name[:40]}...: this name is too long for a capture; give another")
        self.files[name] = shard.path.name


class Writing:
    """Writes a tensor."""

    def __init__(self, lane: Lane, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self._lane = lane
        self._tensor = (name, dtype, shape)
        self._begun = False

    def expect(self, nbytes: int) -> None:
        """See `divergence.staging.Receiver`."""
        self._lane.expect(nbytes)

    def __call__(self, octets: torch.Tensor) -> None:
        """See `divergence.staging.Receiver`."""
        if not self._begun:
            self._begun = True
            self._lane.begin(*self._tensor)
        self._lane.write(octets)


class Filling:
    """Puts the bytes that it is given into a tensor of the host, by numpy: torch would have all cores do it,
    for every thread that receives."""

    def __init__(self, held: torch.Tensor) -> None:
        import torch

        self._octets = held.reshape(-1).view(torch.uint8).numpy()
        self._filled = 0
        self._expected = 0

    def expect(self, nbytes: int) -> None:
        """See `divergence.staging.Receiver`."""
        start = max(self._expected, self._filled)
        self._expected = start + nbytes
        self._octets[start : self._expected] = 0

    def __call__(self, octets: torch.Tensor) -> None:
        """See `divergence.staging.Receiver`."""
        stop = self._filled + octets.numel()
        self._octets[self._filled : stop] = octets.numpy()
        self._filled = stop
