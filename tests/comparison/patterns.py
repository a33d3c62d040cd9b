"""What a kernel must read right, whichever it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from divergence.comparison.metrics import Metrics

Compare = Callable[[torch.Tensor, torch.Tensor], Metrics]

BYTES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.int8, torch.uint8)
INTEGERS = (torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64)


def reads_every_byte(compare: Compare, dtype: torch.dtype) -> None:
    """All 256 bit patterns of a dtype of one byte."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype)
    m = compare(values, values.double())
    assert (m.max_abs, m.ref_nonfinite) == (0, int((~values.double().isfinite()).sum()))


def reads_extremes(compare: Compare, dtype: torch.dtype) -> None:
    """The ends of an integer dtype."""
    ends = torch.iinfo(dtype)
    values = torch.from_numpy(np.array([ends.min, ends.max, 1], dtype=str(dtype).removeprefix("torch.")))
    m = compare(values, torch.zeros(3))
    assert (m.ref_min, m.ref_max) == (float(ends.min), float(ends.max))
