"""The worker process of TensorRT jobs: reads jobs as JSON lines, answers in JSON lines.

Whatever libraries print goes to standard error; standard output carries answers only.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from divergence.errors import DivergenceError, SourceError, one_line
from divergence.probes.tensorrt.device import missing_device


def main(preload: list[str]) -> int:
    """Serves jobs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    absent = missing_device()
    if not absent:
        for module in preload:
            # A job that needs it says so in its own words.
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
    for line in sys.stdin:
        message = json.loads(line)
        _serve(message["job"], message["request"], answers, absent if message["needs_device"] else "")
    return 0


def _serve(job: str, request: dict[str, Any], answers: TextIO, absent: str) -> None:
    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    def progress(label: str, done: int, total: int) -> None:
        answer(progress=[label, done, total])

    if absent:
        answer(error=SourceError.__name__, message=absent)
        return
    try:
        answer(result=_job(job)(request, progress))
    except DivergenceError as error:
        answer(error=type(error).__name__, message=str(error))
    except Exception as error:
        import traceback

        traceback.print_exc()
        answer(error="SourceError", message=f"{job} failed: {one_line(error)}")


def _job(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    job: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return job


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # the system frees what is left sooner than the libraries do, and dies of nothing
