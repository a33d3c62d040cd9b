"""What a plan file says of itself without TensorRT."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from divergence.errors import SourceError

MAGIC = b"ftrt"
"""First bytes of a plan."""

_VERSION_AT = 24
_HEADER = 28
_CHUNK = 64 << 20


@dataclass(frozen=True)
class PlanHeader:
    """Attributes:
    version: of the TensorRT that wrote the plan.
    bytes: size of the file.
    """

    version: tuple[int, int, int, int]
    bytes: int


def read_header(path: Path) -> PlanHeader:
    """Reads the header of a plan, laid out as TensorRT's own `trtexec --getPlanVersionOnly` reads it.

    Raises:
        SourceError: the file is missing, or no plan.
    """
    if path.is_dir():
        raise SourceError(f"{path}: is a folder, not a TensorRT plan; name the file that was built")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEADER)
    except FileNotFoundError:
        raise SourceError(
            f"{path}: no such file; build it (divergence build model.onnx --out {path})"
        ) from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from error
    if len(head) < _HEADER or not head.startswith(MAGIC):
        raise SourceError(
            f"{path}: not a TensorRT plan (it does not begin with {MAGIC.decode()}); "
            "name an engine that was built by TensorRT, or an .onnx file by its own name"
        )
    major, minor, patch, build = head[_VERSION_AT:_HEADER]
    return PlanHeader((major, minor, patch, build), size)


def digest_of(path: Path) -> str:
    """Digest of a file: SHA-256 over the SHA-256 of every 64 MiB, which are computed in parallel.

    Raises:
        SourceError: the file cannot be read.
    """
    own = threading.local()

    def part(start: int) -> bytes:
        if not hasattr(own, "buffer"):  # one for each thread: fresh memory costs as much as reading
            own.buffer = memoryview(bytearray(min(_CHUNK, size)))
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            read = 0
            while read < len(own.buffer) and (more := file.readinto(own.buffer[read:])):
                read += more
        return hashlib.sha256(own.buffer[:read]).digest()

    try:
        size = path.stat().st_size
        starts = range(0, max(1, size), _CHUNK)
        with ThreadPoolExecutor(max_workers=4) as pool:
            whole = hashlib.sha256(b"".join(pool.map(part, starts)))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from error
    return f"sha256x:{whole.hexdigest()[:32]}"
