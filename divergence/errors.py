"""Everything that divergence raises on purpose.

    DivergenceError
    ├── ConfigurationError   divergence.toml, command-line values
    ├── SourceError          a source that cannot be opened, read or run
    ├── InputError           inputs that are missing or do not fit the model
    ├── CaptureError         a capture that cannot be written or read
    ├── StorageError         an address (s3://...) that cannot be opened, read or written
    └── AlignmentError       two runs that have nothing to compare

Every message is one line that says what was wrong, where, and how to mend it;
the command line prints it and exits with status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DivergenceError(Exception):
    """Base of all errors that divergence raises on purpose."""


class ConfigurationError(DivergenceError):
    """A configuration file or an option that cannot be understood."""


class SourceError(DivergenceError):
    """A source (`--ref`, `--cand`) that cannot be opened, read or run."""


class InputError(DivergenceError):
    """Inputs that are missing, or do not fit the model."""


class CaptureError(DivergenceError):
    """A capture that cannot be written or read."""


class StorageError(DivergenceError):
    """An address beyond the disk that cannot be opened, read or written."""


class AlignmentError(DivergenceError):
    """Two runs that have nothing in common to compare."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """The first line of `error`'s message that says something, with what is before it and the type, cut to
    `limit` characters. A word alone says nothing."""
    said: list[str] = []
    for line in filter(None, map(str.strip, str(error).splitlines())):
        said.append(line)
        if " " in line:
            break
    text = " ".join([f"{type(error).__name__}:", *said]) if said else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause `; did you mean 'X'?` naming the known name nearest to `name`, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{found[0]}'?" if found else ""


def counted(number: int, noun: str) -> str:
    """`1 site`, `2 sites`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
