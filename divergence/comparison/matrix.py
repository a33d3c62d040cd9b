"""Two tensors as the GPU kernel reads them: matrices of tokens and channels."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from divergence.comparison import triton_parts as kernel
from divergence.comparison.views import Form, byte_values

if TYPE_CHECKING:
    from divergence.comparison.views import Operands

LONGEST = (1 << 31) - (1 << 20)
"""Rows and columns that can be numbered in int32, with room for those that are cut off."""

FLOATS = {
    torch.float32: int(kernel.FLOAT32.value),
    torch.float64: int(kernel.FLOAT64.value),
    torch.bfloat16: int(kernel.BFLOAT16.value),
    torch.float16: int(kernel.FLOAT16.value),
}
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)

WIDE = (torch.float64, torch.int32, torch.int64, torch.uint32, torch.uint64)
"""Those that float32 cannot hold exactly."""


def pair_of(given: Operands) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Both tensors as `[batch, head, token, channel]`, or None where the kernel cannot compare them."""
    form = given.form
    batch, heads, tokens, channels = form.pooled
    if max(batch * tokens, heads * channels) > LONGEST:
        return None
    try:
        for tensor in (given.ref, given.cand):
            stored(tensor.dtype)
        return form.view(given.ref).view(form.pooled), form.view(given.cand).view(form.pooled)
    except RuntimeError:
        return None


class Matrix:
    """Two tensors as matrices: rows are tokens of all batches, columns channels of all heads."""

    def __init__(self, form: Form, mask: torch.Tensor | None, ref: torch.Tensor, cand: torch.Tensor) -> None:
        self.form = form
        self.mask = mask
        self.sides = (ref, cand)
        self.device = ref.device
        self.batch, self.heads, self.tokens, self.channels = form.pooled
        self.rows = self.batch * self.tokens
        self.columns = self.heads * self.channels
        self.same_dtype = ref.dtype == cand.dtype
        # Threads and columns correspond where both sides are read alike.
        self.native = (
            self.device.type == "cuda"
            and torch.version.hip is None
            and ref.element_size() == cand.element_size()
        )
        self.wide = ref.dtype in WIDE or cand.dtype in WIDE
        self.flat = sum(
            flag << place
            for place, flag in enumerate(
                (*map(self._rows_flat, self.sides), *map(self._columns_flat, self.sides))
            )
        )

    def steps(self, side: torch.Tensor) -> tuple[int, int, int, int]:
        """Strides of batch, head, token and channel; of an axis of one member, that of the outer one."""
        batch, head, token, channel = side.stride()
        return batch, head, batch if self.tokens == 1 else token, head if self.channels == 1 else channel

    def _rows_flat(self, side: torch.Tensor) -> bool:
        batch, _, token, _ = side.stride()
        return 1 in {self.batch, self.tokens} or batch == self.tokens * token

    def _columns_flat(self, side: torch.Tensor) -> bool:
        _, head, _, channel = side.stride()
        return 1 in {self.heads, self.channels} or head == self.channels * channel

    def aligned(self, side: torch.Tensor) -> bool:
        """Whether runs of columns can be read 16 bytes at a time."""
        *outer, channel = self.steps(side)
        sizes = (self.batch, self.heads, self.tokens)
        return (
            channel == 1
            and side.data_ptr() % 16 == 0
            and all(step % 16 == 0 for step, size in zip(outer, sizes, strict=True) if size > 1)
            and (self.channels % 16 == 0 or self.heads == 1)
        )


def stored(dtype: torch.dtype) -> int:
    """How the kernel reads a dtype.

    Raises:
        RuntimeError: it does not.
    """
    if dtype in FLOATS:
        return FLOATS[dtype]
    if dtype in SIGNED:
        return int(kernel.SIGNED.value)
    if dtype in UNSIGNED:
        return int(kernel.UNSIGNED.value)
    if dtype.itemsize > 1:
        raise RuntimeError(f"{dtype}")
    table(dtype, torch.device("cpu"))
    return int(kernel.TABLE.value)


@lru_cache
def table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The values of all 256 bit patterns of a dtype of one byte, float32; anything for others.

    Raises:
        RuntimeError: the dtype has no values of its own.
    """
    values = byte_values(dtype) if dtype.itemsize == 1 else np.zeros(256, np.float32)
    return torch.from_numpy(values).to(device)
