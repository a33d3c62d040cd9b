"""What a comparison works in: a folder for its captures, names of files, threads and cores, and memory
that is not walked again and again."""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from divergence.errors import ConfigurationError

T = TypeVar("T")


@contextlib.contextmanager
def working_folder(keep: Path | None) -> Iterator[Path]:
    """The folder `keep`, or without one a temporary folder that is deleted afterwards."""
    if keep is not None:
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="divergence-") as folder:
        yield Path(folder)


def check_writable(folder: Path) -> None:
    """Makes sure that files can be written into `folder`, which need not be there yet, and leaves all as it
    was.

    Raises:
        ConfigurationError: they cannot.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"{folder}: no folder that can be written into ({error.strerror}); name another one"
        ) from error
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def quiet_collector() -> Iterator[None]:
    """Keeps the garbage collector from walking what was there before: with a large model and its
    libraries loaded, a full collection takes half a second and finds nothing.

    What was made within is collected in the end: let free uncollected, it would count as old, and
    the cycles of hundreds of comparisons, models among them, would wait for a full collection."""
    if gc.get_freeze_count():  # someone else's choice, which unfreezing would undo
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()


def cores() -> int:
    """Cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed is not None else os.cpu_count() or 1


def in_background(work: Callable[[], T], name: str) -> Future[T]:
    """What `work` will give, on a thread of its own called `name`."""
    pool = ThreadPoolExecutor(1, thread_name_prefix=name)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    return future


def file_name(name: str) -> str:
    """`name` without what a file system would object to, at most 80 characters."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)[:80]
