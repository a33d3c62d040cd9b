"""Captures, inputs and reports at any address that fsspec opens: `s3://bucket/x`, `memory://x`, ...

What lies on a disk is read and written in place, `file://` too, and passes by all of this. Elsewhere

- a folder is written on the disk first and uploaded when it is complete, the files that tell a whole one
  from a part of one (`LAST`) at the end, so that an upload that broke off is never taken for a capture;
- the shards of a capture are fetched when they are asked for, into a temporary folder of bounded size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from divergence.captures import MANIFEST, Capture, open_capture
from divergence.errors import CaptureError, DivergenceError, StorageError, nearest, one_line

if TYPE_CHECKING:
    import torch

    from divergence.shards import Span
    from divergence.sites import Site

LAST = (MANIFEST, "report.json", "index.html", "index.json")
"""Files that are uploaded after all others, in this order."""

BUCKETS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss"})
"""Protocols that have no folders: making one would make a bucket, also one whose name is a mistake."""

CACHE_BYTES = 1 << 30
"""Most that the fetched shards of a capture take on the disk, but for the one that is read."""


def located(location: str | os.PathLike[str]) -> Path | str:
    """A path where `location` is on the disk, `file://...` too, else the URL."""
    if not isinstance(location, str) or "://" not in location:
        return Path(location)
    if location.startswith(("file://", "local://")):
        # A tenth of a second, for URLs of files alone.
        from urllib.parse import urlparse
        from urllib.request import url2pathname

        return Path(url2pathname(urlparse(location).path))
    return location


@contextlib.contextmanager
def writing(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write what shall be at `out`: `out` itself, or a temporary one that is uploaded in the
    end, if nothing was raised within.

    Raises:
        StorageError: `out` cannot be written; where that shows at the upload, the message names the folder
            in which everything is kept.
    """
    place = located(out)
    if isinstance(place, Path):
        yield place
        return
    store = _Store.at(place)
    folder = Path(tempfile.mkdtemp(prefix="divergence-upload-"))
    kept = False
    try:
        yield folder
        try:
            store.upload(folder)
        except StorageError as error:
            kept = True
            raise StorageError(f"{error}; nothing is lost: it is kept in {folder}") from error
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


def recorded(path: str | os.PathLike[str], record: Callable[[Path], Capture]) -> Capture:
    """The capture that `record` makes in the folder that it is given, at `path`.

    Raises:
        DivergenceError: it cannot be made, or there is something else at `path`.
    """
    place = located(path)
    if isinstance(place, Path):
        return record(place)
    held = _Store.at(place).sizes()
    if held and MANIFEST not in held and not all(name.endswith(".safetensors") for name in held):
        raise CaptureError(f"{place}: exists and is not a capture; choose another --out")
    with writing(place) as folder:
        record(folder)
    return open_remote(place)


@contextlib.contextmanager
def fetched(url: str) -> Iterator[Path]:
    """The file at `url`, on the disk for as long as the context lasts.

    Raises:
        StorageError: it cannot be read.
    """
    store = _Store.at(url)
    with tempfile.TemporaryDirectory(prefix="divergence-fetch-", ignore_cleanup_errors=True) as folder:
        file = Path(folder) / url.rpartition("/")[2]
        store.fetch("", file)
        yield file


def read_text(url: str, name: str) -> tuple[str, str]:
    """The text of the file `name` in the folder `url`, or of `url` itself if it ends as `name` does; and
    its address.

    Raises:
        StorageError: it cannot be read.
        UnicodeDecodeError: it is no text.
    """
    file = url if url.endswith(Path(name).suffix) else f"{url.rstrip('/')}/{name}"
    with fetched(file) as copy:
        return copy.read_text(encoding="utf-8"), file


def open_remote(url: str) -> Capture:
    """Opens the capture at `url`; its shards are fetched when they are asked for.

    Raises:
        CaptureError: there is none, or it is damaged, judged as one on the disk is.
        StorageError: the address cannot be read.
    """
    store = _Store.at(url)
    sizes = store.sizes()
    if MANIFEST not in sizes:
        if sizes:
            raise CaptureError(
                f"{url}: not a capture (no {MANIFEST} in it: its upload was interrupted, or it is something "
                "else); make one with `divergence capture`"
            )
        raise CaptureError(f"{url}: no such capture; make one with `divergence capture SRC --out {url}`")
    folder = Path(tempfile.mkdtemp(prefix="divergence-remote-"))
    try:
        store.fetch(MANIFEST, folder / MANIFEST)
        for name, size in sizes.items():
            if name != MANIFEST and Path(name).name == name:
                # Holes of the right sizes: what is missing or cut short shows before anything is fetched.
                with open(folder / name, "wb") as file:
                    file.truncate(size)
        local = open_capture(folder)
        fields = {f.name: getattr(local, f.name) for f in dataclasses.fields(local) if f.init}
        return RemoteCapture(**fields, shards=_Shards(store, folder, sizes))
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, CaptureError):
            raise CaptureError(str(error).replace(str(folder), url)) from error
        raise


class _Shards:
    """The shards of a remote capture on the disk, those that were read last."""

    def __init__(self, store: _Store, folder: Path, sizes: Mapping[str, int]) -> None:
        self._store = store
        self._folder = folder
        self._sizes = sizes
        self._held: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()
        # With the shards, not with the capture: what `replace` makes of a capture shares them.
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def fetch(self, file: str) -> None:
        """Sees to it that `file` is in the folder.

        Raises:
            StorageError: it cannot be fetched.
        """
        with self._lock:
            if file in self._held:
                self._held.move_to_end(file)
                return
            size = self._sizes[file]
            while self._held and sum(self._held.values()) + size > CACHE_BYTES:
                # Tensors that still map it keep its content alive until they are gone.
                (self._folder / self._held.popitem(last=False)[0]).unlink(missing_ok=True)
            arriving = self._folder / f"{file}.part"
            self._store.fetch(file, arriving)
            arriving.replace(self._folder / file)
            self._held[file] = size


@dataclass(frozen=True)
class RemoteCapture(Capture):
    """A capture whose `path` holds the shards that were read last, for as long as anybody has them."""

    shards: _Shards = field(kw_only=True, repr=False, compare=False)

    def tensor(self, site: Site) -> torch.Tensor:
        """As of `Capture`; its shard is fetched first.

        Raises:
            StorageError: it cannot be.
        """
        self.shards.fetch(self.entries[site].file)
        return super().tensor(site)

    def span(self, site: Site) -> Span | None:  # noqa: ARG002 - the same of every site
        """None: a shard that may have to be fetched is nothing that a disk could read ahead."""
        return None

    def mask(self, stack: str) -> torch.Tensor | None:
        """As of `Capture`; its shard is fetched first."""
        if file := self.masks.get(stack, self.masks.get("")):
            self.shards.fetch(file)
        return super().mask(stack)


@dataclass(frozen=True)
class _Store:
    """An address and the file system that it belongs to."""

    url: str
    system: Any
    root: str

    @classmethod
    def at(cls, url: str) -> _Store:
        """Raises StorageError where no file system can be had for `url`."""
        with _explained(url, "opened"):
            from fsspec.core import url_to_fs

            system, root = url_to_fs(url)
            system.invalidate_cache()
        return cls(url, system, str(root).rstrip("/"))

    def sizes(self) -> dict[str, int]:
        """Bytes by name, relative to the address, of every file below it; none where it does not exist."""
        with _explained(self.url, "read"):
            try:
                found = self.system.find(self.root, detail=True)
            except FileNotFoundError:
                return {}
        start = len(self.root) + 1
        return {path[start:]: int(info["size"] or 0) for path, info in found.items() if path[start:]}

    def fetch(self, name: str, file: Path) -> None:
        """Copies the file called `name`, or the address itself for "", to `file`."""
        path = f"{self.root}/{name}" if name else self.root
        url = f"{self.url.rstrip('/')}/{name}" if name else self.url
        with _explained(url, "read"):
            self.system.get_file(path, str(file))
            size = self.system.info(path)["size"]
        if size is not None and file.stat().st_size != size:
            raise StorageError(f"{url}: {file.stat().st_size} of {size} bytes arrived; try again")

    def upload(self, folder: Path) -> None:
        """Makes what is in `folder` the content of the address."""
        files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
        ordered = sorted(files, key=lambda name: (_rank(name), name))
        before = self.sizes()
        with _explained(self.url, "written"):
            # A mark of completeness that is there from before would vouch for a mixture of old and new.
            for name in reversed(ordered):
                if _rank(name) >= 0 and name in before:
                    self.system.rm_file(f"{self.root}/{name}")
            for name in ordered:
                self._put(files[name], name)
            whole = {name.removesuffix(MANIFEST) for name in files if Path(name).name == MANIFEST}
            for name in before.keys() - files.keys():
                # A capture is replaced as a whole; reports of other comparisons may stay.
                if name[: name.rfind("/") + 1] in whole and name.endswith(".safetensors"):
                    self.system.rm_file(f"{self.root}/{name}")

    def _put(self, file: Path, name: str) -> None:
        path = f"{self.root}/{name}"
        if self.url.partition("://")[0] not in BUCKETS:
            self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
        self.system.put_file(str(file), path)
        size = self.system.info(path)["size"]
        if size is not None and size != file.stat().st_size:
            raise StorageError(f"{self.url}/{name}: {size} of {file.stat().st_size} bytes were written")


def _rank(name: str) -> int:
    """When to upload `name`: -1 for no matter when, else its place in `LAST`."""
    base = Path(name).name
    return LAST.index(base) if base in LAST else -1


@contextlib.contextmanager
def _explained(url: str, done: str) -> Iterator[None]:
    """Whatever a file system raises, in one line that says what to check."""
    protocol = url.partition("://")[0]
    try:
        yield
    except DivergenceError:
        raise
    except ImportError as error:
        raise StorageError(f"{url}: {_missing(protocol, error)}") from error
    except FileNotFoundError as error:
        raise StorageError(f"{url}: no such file or folder; check the address") from error
    except PermissionError as error:
        raise StorageError(
            f"{url}: may not be {done} ({one_line(error)}); check the credentials that {protocol} uses"
        ) from error
    except Exception as error:
        if isinstance(error, ValueError) and "rotocol not known" in str(error):
            from fsspec import available_protocols

            hint = nearest(protocol, available_protocols())
            raise StorageError(f"{url}: fsspec knows no protocol '{protocol}'{hint}") from error
        raise StorageError(
            f"{url}: cannot be {done} ({one_line(error)}); check the address, and that it can be reached"
        ) from error


def _missing(protocol: str, error: ImportError) -> str:
    """Which library a protocol lacks."""
    from fsspec.registry import known_implementations

    known = known_implementations.get(protocol.partition("::")[0], {})
    library = str(known.get("class", "")).partition(".")[0]
    if library in ("", "fsspec"):
        return f"a library is missing ({one_line(error)}); install it"
    return f"{protocol}:// needs a library that is not installed; pip install {library}"
