"""Jobs for tests of the worker; none touches a device."""

from __future__ import annotations

import os
import sys
from typing import Any

from divergence.errors import InputError
from divergence.probes import Progress


def echo(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Gives back what it was given, after some progress and some printing."""
    print("a library prints this", flush=True)
    progress("echoing", 1, 2)
    return request


def refuse(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Raises one of divergence's own errors."""
    del progress
    raise InputError(request["message"])


def stumble(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Raises an error that nobody foresaw."""
    del progress
    return {"value": request["absent"]}


def abort(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Dies as a C++ library does when an assertion fails."""
    del request, progress
    print("terminate called without an active exception", file=sys.stderr, flush=True)
    os.abort()
