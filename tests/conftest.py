"""What all tests share: skips with their reasons, and assertions of shared checks that explain themselves."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
from collections.abc import Callable

# Before torch is imported: tests run in several processes, and threads that wait for each other on a busy
# machine take ten times as long as one alone.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Before triton is imported, which torch leaves to those who need it: without a device its interpreter runs
# the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import settings

# How long an example takes says more about the machine than about the code; in CI the examples are
# the same every time, so that a failure is the change's.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

pytest.register_assert_rewrite("tests.probes.contract")


def pytest_configure() -> None:
    """Interrupts are taken: a shell has what it starts in the background ignore them, this process and
    all that it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what this machine cannot run, and says why."""
    missing: dict[str, Callable[[], str]] = {
        "gpu": _no_gpu,
        "tensorrt": lambda: _no_gpu() or _no_module("tensorrt"),
        "browser": lambda: _no_module("playwright") if chromium() else "no Chromium on the PATH",
    }
    for name, reason_of in missing.items():
        marked = [item for item in items if item.get_closest_marker(name)]
        if marked and (reason := reason_of()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def _no_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "no CUDA device"


def _no_module(name: str) -> str:
    return "" if importlib.util.find_spec(name) else f"{name} is not installed"


def chromium() -> str | None:
    """The browser for tests that look at a page."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((found for name in names if (found := shutil.which(name))), None)
