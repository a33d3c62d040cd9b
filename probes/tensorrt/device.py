"""Whether there is a CUDA device, asked of the driver alone.

TensorRT's builder aborts the process where there is none, so this comes before any import of it.
"""

from __future__ import annotations

import ctypes
import importlib.util

_ELSEWHERE = (
    "run this where there is one: record the engine there (divergence capture engine.plan --out "
    "run.capture) and compare the capture here"
)


def device_size() -> int | None:
    """Bytes of memory that the first CUDA device has; None where there is none."""
    driver = _driver()
    if driver is None:
        return None
    device, size = ctypes.c_int(), ctypes.c_size_t()
    if (  # each gives 0 where it succeeds
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    ):
        return None
    return size.value


def missing_device() -> str:
    """Why TensorRT cannot run here, as a message, or ""."""
    driver = _driver()
    if driver is None:
        return f"TensorRT needs a CUDA device, and this machine has no CUDA driver; {_ELSEWHERE}"
    status = driver.cuInit(0)
    if status != 0:
        return f"TensorRT needs a CUDA device, and the driver reports error {status}; {_ELSEWHERE}"
    count = ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return f"TensorRT needs a CUDA device, and the driver finds none; {_ELSEWHERE}"
    if importlib.util.find_spec("tensorrt") is None:
        return "TensorRT is not installed; pip install 'divergence-debugger[tensorrt]'"
    return ""


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
