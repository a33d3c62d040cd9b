"""Shards: safetensors files that are written a piece at a time and read a part at a time.

A shard is open for writing before it is known what will be in it, so room for its header is kept in
front and padded with spaces, as the format allows. For reading it is mapped into memory, and what has
been read can be handed back (`release`), so that a tensor larger than memory can be gone through.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from divergence.precision import dtype_name, torch_dtype

if TYPE_CHECKING:
    import torch

HEADER_BYTES = 16 << 10
"""Kept for the length and text of a header: about 120 tensors. Data starts at a page."""

DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
}
"""Names of dtypes in safetensors by torch's."""

_NAMES = {ours: theirs for theirs, ours in DTYPES.items()}
_LENGTH = 8
_ZEROS = memoryview(bytes(1 << 20))
_MOST_HEADER = 100 << 20  # what safetensors itself takes


class ShardWriter:
    """Writes one shard.

    Args:
        path: file to make.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.nbytes = 0
        self._expected = 0
        self._described: dict[str, str] = {}
        self._header = 2
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def begin(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
        """Announces a tensor, whose bytes `write` appends. One of the same name is given another.

        Returns:
            Whether there is room for it, in the header and at a multiple of its size; else nothing is done.
        """
        if self.nbytes % dtype.itemsize:
            return False
        quoted = json.dumps(name)
        text = (
            f'{{"dtype":"{DTYPES[dtype_name(dtype)]}","shape":{list(shape)},'
            f'"data_offsets":[{self.nbytes},{self.nbytes + math.prod(shape) * dtype.itemsize}]}}'
        )
        earlier = f'"replaced:{len(self._described)}"' if quoted in self._described else ""
        header = self._header + len(quoted) + len(text) + 2 + max(0, len(earlier) - len(quoted))
        if header > HEADER_BYTES - _LENGTH:
            return False
        if earlier:
            self._described[earlier] = self._described.pop(quoted)
        self._described[quoted] = text
        self._header = header
        return True

    def expect(self, nbytes: int) -> None:
        """Makes the file longer by what `write` is going to append later.

        Raises:
            OSError: as `write`.
        """
        start = max(self._expected, self.nbytes)
        self._expected = start + nbytes
        for at in range(start, self._expected, len(_ZEROS)):
            os.pwrite(self._file, _ZEROS[: self._expected - at], HEADER_BYTES + at)

    def write(self, octets: torch.Tensor) -> None:
        """Appends bytes (`uint8`, contiguous, on the CPU).

        Raises:
            OSError: the disk is full, or fails.
        """
        left = memoryview(octets.numpy().data)
        while left:
            done = os.pwrite(self._file, left, HEADER_BYTES + self.nbytes)
            self.nbytes += done
            left = left[done:]

    def close(self) -> int:
        """Writes the header. Returns the size of the file in bytes.

        Raises:
            OSError: as `write`.
        """
        length = HEADER_BYTES - _LENGTH
        content = ",".join(f"{name}:{text}" for name, text in self._described.items())
        text = f"{{{content}}}".encode().ljust(length)
        try:
            os.pwrite(self._file, length.to_bytes(_LENGTH, "little") + text, 0)
            os.ftruncate(self._file, HEADER_BYTES + self.nbytes)
        finally:
            self.abandon()
        return HEADER_BYTES + self.nbytes

    def abandon(self) -> None:
        """Closes the file as it is."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _octets(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, copied if it is not contiguous."""
    import torch

    flat = tensor.contiguous().reshape(-1)
    # A single element may keep a stride of its own.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)


def pieces(tensor: torch.Tensor, limit: int) -> Iterator[torch.Tensor]:
    """The bytes of `tensor` in order, as flat `uint8` tensors of at most `limit` bytes (one element at
    least), on its device; copied are only those of a tensor that is not contiguous, each by itself."""
    nbytes = tensor.numel() * tensor.element_size()
    if tensor.is_contiguous() or nbytes <= limit:
        yield from _octets(tensor).split(max(limit, 1))
        return
    row = nbytes // tensor.shape[0]
    if row > limit:
        for part in tensor.unbind(0):
            yield from pieces(part, limit)
    else:
        for part in tensor.split(limit // row):
            yield _octets(part)


_MAPPINGS: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()
_WATCHING: list[Callable[[int], None]] = []


@dataclass(frozen=True)
class Span:
    """Where a tensor lies: bytes `start` to `stop` of the file at `path`."""

    path: Path
    start: int
    stop: int


class Shard:
    """A shard, mapped for reading.

    Args:
        path: of a safetensors file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        import torch

        self.path = path
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(_LENGTH), "little")
            if not 2 <= length <= min(_MOST_HEADER, size - _LENGTH):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
            # A private mapping: torch has no read-only memory. Nothing is written into it.
            self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._data = _LENGTH + length
        self._octets = torch.frombuffer(self._mapping, dtype=torch.uint8)
        _MAPPINGS[self._octets.data_ptr()] = self._mapping
        self._tensors: dict[str, tuple[torch.dtype, list[int], int, int]] = {}
        for name, item in header.items():
            if name == "__metadata__":
                continue
            dtype, shape, (start, stop) = (
                torch_dtype(_NAMES[item["dtype"]]),
                item["shape"],
                item["data_offsets"],
            )
            whole = 0 <= start <= stop <= size - self._data
            if not whole or stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"'{name}' does not lie within the file")
            self._tensors[name] = (dtype, shape, self._data + start, self._data + stop)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor called `name`; its bytes are read when they are looked at.

        Raises:
            KeyError: there is none.
        """
        dtype, shape, start, stop = self._tensors[name]
        if start % dtype.itemsize:
            return self._octets[start:stop].clone().view(dtype).reshape(shape)
        return self._octets[start:stop].view(dtype).reshape(shape)

    def span(self, name: str) -> Span:
        """Where it lies.

        Raises:
            KeyError: there is none.
        """
        _, _, start, stop = self._tensors[name]
        return Span(self.path, start, stop)


def release(tensor: torch.Tensor) -> None:
    """Hands the memory of a shard's tensor, or of a part of one, back to the system; it is read again if
    it is looked at again. Nothing happens to any other tensor."""
    storage = tensor.untyped_storage()
    mapping = _MAPPINGS.get(storage.data_ptr()) if tensor.device.type == "cpu" else None
    if mapping is None or not tensor.numel() or not hasattr(mmap, "MADV_DONTNEED"):
        return
    size = tensor.element_size()
    extent = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    first = int(tensor.storage_offset()) * size
    # The page that the next part shares stays.
    start, stop = (at // mmap.PAGESIZE * mmap.PAGESIZE for at in (first, first + int(extent) * size))
    if stop > start:
        mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)
    for told in _WATCHING:
        told(tensor.numel() * size)


class ReadAhead:
    """Has the disk read what is going to be looked at, in its order, while what came before is worked on.

    Reading goes through the system's cache, so that nothing is held here but a buffer of `PIECE` bytes;
    where pages are only read when they are looked at, a disk answers one small request after another.
    Use as a context manager.

    Args:
        groups: where the tensors lie that are looked at together, group after group.
        distance: bytes to be ahead by.
        drop: have the system forget what was read when its group is done: it is more than fits.
    """

    PIECE = 4 << 20

    def __init__(self, groups: Sequence[Sequence[Span]], *, distance: int, drop: bool) -> None:
        self._groups = groups
        self._distance = max(distance, self.PIECE)
        self._drop = drop
        self._ends = list(itertools.accumulate(sum(s.stop - s.start for s in group) for group in groups))
        self._seen = 0
        self._moved = threading.Condition()
        self._stopped = False
        self._files: dict[Path, int] = {}
        self._thread = threading.Thread(target=self._read, name="read-ahead", daemon=True)

    def __enter__(self) -> Self:
        if hasattr(os, "preadv") and self._ends:
            _WATCHING.append(self._look)
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._thread.ident is not None:
            _WATCHING.remove(self._look)
            with self._moved:
                self._stopped = True
                self._moved.notify_all()
            self._thread.join()
        for file in self._files.values():
            os.close(file)

    def done(self, group: int) -> None:
        """Says that group number `group`, and all before it, are not looked at any more."""
        with self._moved:
            self._seen = self._ends[group]
            self._moved.notify_all()
        if self._drop and hasattr(os, "posix_fadvise"):
            for span in self._groups[group]:
                file = self._files.get(span.path)
                if file is not None:
                    os.posix_fadvise(file, span.start, span.stop - span.start, os.POSIX_FADV_DONTNEED)

    def _look(self, nbytes: int) -> None:
        with self._moved:
            self._seen += nbytes
            self._moved.notify_all()

    def _read(self) -> None:
        buffer = bytearray(self.PIECE)
        read = 0
        for path, start, stop in self._pieces():
            with self._moved:
                self._moved.wait_for(lambda: self._stopped or read - self._seen < self._distance)  # noqa: B023
                if self._stopped:
                    return
            try:
                if path not in self._files:
                    self._files[path] = os.open(path, os.O_RDONLY)
                os.preadv(self._files[path], [memoryview(buffer)[: stop - start]], start)
            except OSError:
                return  # who looks at the tensor gets the error
            read += stop - start

    def _pieces(self) -> Iterator[tuple[Path, int, int]]:
        """Parts of each group's files, those of its members in turn."""
        for group in self._groups:
            parts = [
                [(s.path, at, min(at + self.PIECE, s.stop)) for at in range(s.start, s.stop, self.PIECE)]
                for s in group
            ]
            for turn in itertools.zip_longest(*parts):
                yield from filter(None, turn)
