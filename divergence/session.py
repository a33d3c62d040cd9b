"""What the comparisons of a test session share; `divergence.pytest_plugin` begins and ends it.

Light on purpose: pytest loads it for every suite, whether or not it compares anything.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from divergence.errors import ConfigurationError, DivergenceError, nearest, one_line

if TYPE_CHECKING:
    from divergence.config import Config
    from divergence.reference_cache import ReferenceCache
    from divergence.result import Comparison

OPTIONS = ("precision", "tolerance", "exclude", "detail", "replay", "floor", "memory", "diagnose", "inputs")
"""What `@pytest.mark.divergence(...)` may set, beside tolerances by position."""

MARKER = "@pytest.mark.divergence"
_NAME_LENGTH = 80


@dataclass(eq=False)
class Session:
    """A running test session.

    Attributes:
        root: folder whose configuration counts where the current folder has none.
        report: folder for the reports of all comparisons, or None.
        log: file that a line of JSON is appended to for every comparison, or None.
        test: node id of the test that runs; "" between tests.
        marks: positional and keyword arguments of its markers, the farthest first.
    """

    root: Path
    report: Path | None = None
    log: Path | None = None
    test: str = ""
    marks: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]] = ()
    _numbers: Counter[str] = field(default_factory=Counter)
    _references: ReferenceCache | None = None

    def config(self) -> Config:
        """The configuration of the current folder, or else of the root.

        Raises:
            ConfigurationError: it cannot be understood.
        """
        from divergence.config import load_config

        found = load_config()
        return found if found.path else load_config(start=self.root)

    @property
    def references(self) -> ReferenceCache:
        """The references that have run in this session."""
        from divergence.reference_cache import ReferenceCache

        if self._references is None:
            self._references = ReferenceCache()
        return self._references

    def marked(self) -> tuple[list[object], dict[str, Any]]:
        """Tolerances of the test's markers, the nearest last, and their other options.

        Raises:
            ConfigurationError: a marker has an option that there is not.
        """
        tolerances: list[object] = []
        options: dict[str, Any] = {}
        for args, kwargs in self.marks:
            for name in kwargs:
                if name not in OPTIONS:
                    hint = nearest(name, OPTIONS) or f"; known: {', '.join(OPTIONS)}"
                    raise ConfigurationError(f"{MARKER}: has no option '{name}'{hint}")
            tolerances += args
            tolerances += [kwargs["tolerance"]] if "tolerance" in kwargs else []
            options |= {name: value for name, value in kwargs.items() if name != "tolerance"}
        return tolerances, options

    def command(self) -> str:
        """What runs the present test again."""
        return shlex.join(["pytest", self.test] if self.test else ["pytest"])

    def record(self, result: Comparison) -> Path | None:
        """Writes the reports of `result`, if reports are asked for.

        Returns:
            The page.

        Raises:
            DivergenceError: they cannot be written.
        """
        if self.report is None or self.log is None:
            return None
        from divergence.reports import write_all
        from divergence.reports.index import entry_of
        from divergence.working import quiet_collector

        test = self.test or "(outside of a test)"
        self._numbers[test] += 1
        number = self._numbers[test]
        folder = folder_name(test, number)
        try:
            # Figures are full of cycles: 200 comparisons would leave 2 GB for the collector to find.
            with quiet_collector():
                (page,) = write_all(result, self.report / folder)
            line = json.dumps(entry_of(result, test, number, folder), allow_nan=False)
            with open(self.log, "a", encoding="utf-8") as log:
                log.write(line + "\n")
        except OSError as error:
            raise DivergenceError(
                f"--divergence-report {self.report}: cannot be written ({one_line(error)}); "
                f"the verdict was {result.verdict}: {result.reason}"
            ) from error
        return page

    def close(self) -> None:
        """Deletes the captures that were kept for the session."""
        if self._references is not None:
            self._references.close()


def folder_name(test: str, number: int = 1) -> str:
    """The folder of the `number`th comparison of `test`: readable, ASCII, and another for every test
    on every file system, whatever the characters of its node id."""
    readable = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in test)
    digest = hashlib.sha256(test.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    suffix = "" if number == 1 else f"-{number}"
    return f"{readable[:_NAME_LENGTH].strip('.')}-{digest}{suffix}"


_running: list[Session] = []


def begin(session: Session) -> None:
    """Makes `session` the current one; sessions nest where pytest runs within pytest."""
    _running.append(session)


def end(session: Session) -> None:
    """Ends `session`."""
    _running.remove(session)
    session.close()


def current() -> Session | None:
    """The innermost running session, or None."""
    return _running[-1] if _running else None
