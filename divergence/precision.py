"""Numeric precisions that a candidate can run in, and what each can resolve."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from divergence.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "bf16-weights", "fp8", "int8")

# Unit roundoff u = 2^-(p) for p significant bits including the implicit one (IEEE 754; tf32 has
# the mantissa of fp16, e4m3 has 4 significant bits). int8: half a step of 1/127.
UNIT_ROUNDOFF = {
    "fp32": 2.0**-24,
    "tf32": 2.0**-11,
    "fp16": 2.0**-11,
    "bf16": 2.0**-8,
    "bf16-weights": 2.0**-8,
    "fp8": 2.0**-4,
    "int8": 0.5 / 127,
}

_DTYPE_PRECISION = {
    "float64": "fp32",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
    "int8": "int8",
}


def check_precision(name: str) -> str:
    """Returns `name` if it is a known precision.

    Raises:
        ConfigurationError: it is not.
    """
    if name not in PRECISIONS:
        hint = nearest(name, PRECISIONS) or f"; known: {', '.join(PRECISIONS)}"
        raise ConfigurationError(f"precision '{name}' is unknown{hint}")
    return name


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """`bfloat16` -> `torch.bfloat16`.

    Raises:
        ConfigurationError: torch has no such dtype.
    """
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ConfigurationError(f"'{name}' is not a dtype of torch; use float32, float16, bfloat16, ...")
    return found


def integers_of(nbytes: int) -> torch.dtype:
    """The signed integers of 1, 2, 4 or 8 bytes: what sees the bits of any dtype of that size in place."""
    import torch

    return {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[nbytes]


def coarsest(dtypes: Iterable[str]) -> str | None:
    """The coarsest precision among dtype names, or None if none of them is floating or int8."""
    return coarsest_of(_DTYPE_PRECISION[d] for d in dtypes if d in _DTYPE_PRECISION)


def coarsest_of(precisions: Iterable[str]) -> str | None:
    """The coarsest of precisions, or None if there are none."""
    return max(precisions, key=UNIT_ROUNDOFF.__getitem__, default=None)
