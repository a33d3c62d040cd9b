"""What is compared: tensors and arrays brought to one form, without copying them.

The canonical form of a tensor is `[batch, heads..., token, channel]`: a view with its named axes
in that order and axes of size 1 for those that it lacks.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from divergence.errors import AlignmentError

if TYPE_CHECKING:
    import torch

    Floats32 = np.ndarray[Any, np.dtype[np.float32]]
    Values = torch.Tensor | np.ndarray[Any, Any]

AXES = ("batch", "head", "token", "channel")


@dataclass(frozen=True)
class Form:
    """How a tensor's axes map to the canonical form.

    Attributes:
        shape: of the tensor itself.
        order: its axes in canonical order.
        missing: positions in the canonical form of axes that the tensor lacks.
        has_head: whether there is a head axis.
        sizes: of the canonical form, `(batch, heads..., token, channel)`.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    missing: tuple[int, ...]
    has_head: bool
    sizes: tuple[int, ...]

    @property
    def pooled(self) -> tuple[int, int, int, int]:
        """`(batch, head, token, channel)`, several head axes counted as one."""
        heads = 1
        for size in self.sizes[1:-2]:
            heads *= size
        return self.sizes[0], heads, self.sizes[-2], self.sizes[-1]

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The canonical view of a tensor of this form."""
        result = tensor.permute(self.order)
        for position in self.missing:
            result = result.unsqueeze(position)
        return result

    def index(self, batch: int, head: int, token: int, channel: int) -> tuple[int, ...]:
        """The index into the tensor itself of an element of the canonical form."""
        heads = np.unravel_index(head, self.sizes[1:-2])
        canonical = (batch, *(int(i) for i in heads), token, channel)
        present = [i for position, i in enumerate(canonical) if position not in self.missing]
        result = dict(zip(self.order, present, strict=True))
        return tuple(result[axis] for axis in range(len(self.shape)))


def default_axes(rank: int) -> tuple[str, ...]:
    """Axis names where none are given: the last is the channel, the one before it the token, the
    first of the rest the batch; what is left between batch and token counts as heads, together."""
    if rank <= 3:
        return ("batch", "token", "channel")[3 - rank :]
    return ("batch", *["head"] * (rank - 3), "token", "channel")


def form_of(shape: tuple[int, ...], axes: tuple[str, ...]) -> Form:
    """The form of a tensor.

    Args:
        shape: its shape.
        axes: a name of `AXES` for each axis, or nothing for `default_axes`.

    Raises:
        AlignmentError: the names do not fit the shape, or the tensor is empty.
    """
    names = axes or default_axes(len(shape))
    if axes and (len(axes) != len(shape) or len(set(axes)) != len(axes) or not set(axes) <= set(AXES)):
        raise AlignmentError(
            f"axes {list(axes)} do not name the axes of a tensor of shape {list(shape)}; "
            f"give each one of {', '.join(AXES)}, none twice"
        )
    if 0 in shape:
        raise AlignmentError(f"nothing to compare: a tensor of shape {list(shape)} has no elements")
    order: list[int] = []
    missing: list[int] = []
    sizes: list[int] = []
    for name in AXES:
        found = [axis for axis, other in enumerate(names) if other == name]
        if not found:
            missing.append(len(sizes))
        order += found
        sizes += [shape[axis] for axis in found] or [1]
    return Form(tuple(shape), tuple(order), tuple(missing), "head" in names, tuple(sizes))


def as_tensor(values: Values) -> torch.Tensor:
    """A torch view of a tensor or array.

    Copied are only arrays that torch cannot view (negative strides, foreign byte order) and tensors
    that torch would negate while reading.

    Raises:
        AlignmentError: not real numbers, or neither tensor nor array.
    """
    import torch

    tensor = _from_numpy(values) if isinstance(values, np.ndarray | np.generic) else values
    if not isinstance(tensor, torch.Tensor):
        raise AlignmentError(f"cannot compare a {type(values).__name__}; give torch tensors or numpy arrays")
    if tensor.is_complex() or tensor.is_quantized or tensor.layout is not torch.strided:
        raise AlignmentError(
            f"cannot compare tensors of dtype {tensor.dtype} and layout {tensor.layout}; "
            "give dense tensors of real numbers"
        )
    return tensor.detach().resolve_neg()


def _from_numpy(values: np.ndarray[Any, Any] | np.generic) -> torch.Tensor:
    import torch

    array = np.asarray(values)
    special = getattr(torch, array.dtype.name, None)  # ml_dtypes: bfloat16, float8_e4m3fn, ...
    if array.dtype.kind == "V" and isinstance(special, torch.dtype):
        return _from_numpy(array.view(f"u{array.dtype.itemsize}")).view(special)
    if array.dtype.kind not in "biuf":
        raise AlignmentError(f"cannot compare an array of dtype {array.dtype}; give real numbers")
    if array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = array.copy()
    with warnings.catch_warnings():  # a read-only array: torch warns of writing, and nothing here writes
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


@lru_cache
def byte_values(dtype: torch.dtype) -> Floats32:
    """The values of all 256 bit patterns of a dtype of one byte.

    Raises:
        RuntimeError: it has none of its own, like packed types.
    """
    import torch

    patterns = torch.arange(256, dtype=torch.uint8)
    values = patterns.ne(0) if dtype is torch.bool else patterns.view(dtype)
    result: Floats32 = values.to(torch.float32).numpy()
    return result


@dataclass(frozen=True)
class Operands:
    """Two tensors to compare and what is valid of them.

    Attributes:
        ref, cand: the tensors themselves, equal in shape.
        mask: valid tokens `[batch, token]` (bool, on the CPU), or None where all are.
        form: of both.
    """

    ref: torch.Tensor
    cand: torch.Tensor
    mask: torch.Tensor | None
    form: Form


def operands(ref: Values, cand: Values, axes: tuple[str, ...], mask: Values | None) -> Operands:
    """Checks two tensors and their mask.

    Raises:
        AlignmentError: they differ in shape, are empty, or names or mask do not fit them.
    """
    import torch

    left, right = as_tensor(ref), as_tensor(cand)
    if left.shape != right.shape:
        raise AlignmentError(
            f"cannot compare a reference of shape {list(left.shape)} with a candidate of shape "
            f"{list(right.shape)}; bring them to one shape first"
        )
    form = form_of(tuple(left.shape), axes)
    if mask is None:
        return Operands(left, right, None, form)
    valid = as_tensor(mask).to("cpu", torch.bool)
    expected = (form.pooled[0], form.pooled[2])
    if tuple(valid.shape) != expected:
        raise AlignmentError(
            f"a mask of shape {list(valid.shape)} does not fit a tensor of shape {list(left.shape)}; "
            f"give it as [batch, token], here {list(expected)}"
        )
    return Operands(left, right, valid, form)
