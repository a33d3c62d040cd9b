"""Loads engines. Imported by the worker only.

PyTorch is imported while TensorRT reads the plan: either takes seconds, and neither needs the other.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import tensorrt as trt

from divergence.errors import SourceError
from divergence.probes import Progress


class Logger(trt.ILogger):  # type: ignore[misc]  # ships no types
    """Keeps TensorRT's warnings and errors, and writes them to standard error."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []
        self.errors: list[str] = []

    def log(self, severity: Any, msg: str) -> None:
        """Called by TensorRT."""
        if severity in (self.ERROR, self.INTERNAL_ERROR):
            self.errors.append(msg)
        elif severity == self.WARNING:
            self.warnings.append(msg)
        else:
            return
        print(msg, file=sys.stderr, flush=True)


Loaded = tuple[Logger, trt.ICudaEngine, float]
"""What was logged, the engine, and the seconds that loading it took."""


def here() -> dict[str, str]:
    """What an engine is bound to, of this machine."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "tensorrt": trt.__version__,
        "gpu": properties.name,
        "compute": f"{properties.major}.{properties.minor}",
        "platform": f"{platform.system()} {platform.machine()}",
        "cuda": torch.version.cuda or "",
    }


def load_plugins(logger: Logger, plugins: list[str]) -> None:
    """Registers TensorRT's own plugins and those of the libraries `plugins`.

    Raises:
        SourceError: a library cannot be loaded.
    """
    for library in plugins:
        try:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise SourceError(f"{library}: the plugin library cannot be loaded ({error})") from error
    try:
        trt.init_libnvinfer_plugins(logger, "")
    except (AttributeError, RuntimeError) as error:
        print(f"TensorRT's own plugins are not available ({error})", file=sys.stderr)


def deserialize(logger: Logger, request: Mapping[str, Any]) -> trt.ICudaEngine:
    """Loads the plan `request["plan"]`.

    Raises:
        SourceError: it does not load here; the message names both sides.
    """
    path = Path(request["plan"])
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = True  # engines built version-compatible carry code
    with path.open("rb") as file:
        # Mapped: a copy in fresh memory takes as long as what TensorRT does with it.
        plan = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        ours, theirs = here(), dict(request.get("built") or {})
        written = theirs.get("tensorrt") or request.get("version") or "unknown"
        target = " ".join(theirs[k] for k in ("gpu", "platform") if k in theirs)
        said = " ".join((logger.errors or ["no reason given"])[0].split())[:300]
        raise SourceError(
            f"{path}: cannot be loaded: it was built by TensorRT {written}"
            f"{f' for {target}' if target else ''}, and this is TensorRT {ours['tensorrt']} "
            f"on {ours['gpu']} {ours['platform']} ({said}); "
            "rebuild it here, or check that the file is whole"
        )
    return engine


_ready: dict[str, Loaded] = {}
"""Engines that `load` has got ready, by plan."""


def load(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Loads an engine into the primary context and keeps it for the next `run` or `describe` of it."""
    del progress
    _ready[request["plan"]] = load_engine(request)
    return {}


def loaded(plan: str) -> Loaded | None:
    """Takes the engine of `plan` that `load` has got ready, if there is one."""
    return _ready.pop(plan, None)


def load_engine(request: Mapping[str, Any]) -> Loaded:
    """Loads the plan `request["plan"]` into the primary context.

    Raises:
        SourceError: as `deserialize` and `load_plugins`.
    """
    meanwhile = Thread(target=importlib.import_module, args=("torch",), name="import-torch")
    meanwhile.start()
    plugins = request.get("plugins", [])
    if plugins:  # one that is linked with PyTorch finds the libraries that are loaded
        meanwhile.join()
    try:
        logger = Logger()
        load_plugins(logger, plugins)
        started = time.monotonic()
        engine = deserialize(logger, request)
        return logger, engine, time.monotonic() - started
    finally:
        meanwhile.join()
