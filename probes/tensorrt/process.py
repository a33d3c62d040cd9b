"""The worker process of TensorRT jobs, as its owner sees it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO, Any, Self

from divergence import errors
from divergence.errors import SourceError
from divergence.probes import Progress, silent

LAST_LINES = 3
"""Lines of a dead worker's log that its error message quotes."""

_STOP_S = 10.0


class Worker:
    """A process that runs jobs one after another.

    It starts at once, and loads what jobs need while its owner does other work. Close it, or use it
    as a context manager.

    Args:
        module: what the process runs.
        preload: modules that it imports while it waits for its first job.
    """

    def __init__(
        self,
        module: str = "divergence.probes.tensorrt.worker",
        preload: tuple[str, ...] = ("torch", "tensorrt"),
    ) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile(prefix="divergence-worker-")  # noqa: SIM115 - closed in close()
        self._posted = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        process = self._process
        if self._posted:  # nobody waits for what it is doing
            process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._log.close()

    def call(
        self,
        job: str,
        request: Mapping[str, Any],
        *,
        about: str,
        progress: Progress = silent,
        needs_device: bool = True,
    ) -> dict[str, Any]:
        """Runs a job and returns its result.

        Args:
            job: `MODULE:FUNCTION`, called with the request and a `Progress`.
            request: JSON values.
            about: what the job is about (a file), which error messages begin with.
            progress: told about long work.
            needs_device: refuse, before anything is imported, where there is no CUDA device.

        Raises:
            DivergenceError: the one that the job raised.
            SourceError: the process died; the message ends with the last lines of its log.
        """
        self._send(job, request, about, needs_device=needs_device)
        self._posted += 1
        return self.fetch(about=about, progress=progress)

    def post(self, job: str, request: Mapping[str, Any], *, about: str) -> None:
        """Starts a job and does not wait; the next `call` or `fetch` does, and raises what it raised."""
        self._send(job, request, about, needs_device=True)
        self._posted += 1

    def fetch(self, *, about: str, progress: Progress = silent) -> dict[str, Any]:
        """Waits for all jobs that were posted and returns the result of the last.

        Args and raises: as `call`.
        """
        while self._posted > 1:
            self._posted -= 1
            self._answer(about, silent)
        self._posted = 0
        return self._answer(about, progress)

    def _send(self, job: str, request: Mapping[str, Any], about: str, *, needs_device: bool) -> None:
        assert self._process.stdin is not None
        message = {"job": job, "request": dict(request), "needs_device": needs_device}
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise self._died(about) from None

    def _answer(self, about: str, progress: Progress) -> dict[str, Any]:
        for answer in self._answers():
            if "progress" in answer:
                progress(*answer["progress"])
            elif "error" in answer:
                kind = getattr(errors, answer["error"], SourceError)
                raise kind(answer["message"])
            else:
                result: dict[str, Any] = answer["result"]
                return result
        raise self._died(about)

    def _answers(self) -> Iterator[dict[str, Any]]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield json.loads(line)

    def _died(self, about: str) -> SourceError:
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        lines = " | ".join(self.log()[-LAST_LINES:]) or "nothing"
        return SourceError(
            f"{about}: the TensorRT process {how}; its last words: {lines}; "
            "nothing else was lost: mend or rebuild the engine and run again"
        )

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def log(self) -> list[str]:
        """The lines that the process wrote to its standard error so far."""
        self._log.seek(0)
        text = self._log.read().decode("utf-8", "replace")
        return [line.strip() for line in text.splitlines() if line.strip()]
