"""Comparison: how two tensors differ.

`metrics` holds the definitions, `cpu` the implementation that compares on the CPU with a compiled kernel
(`kernel`, `loops`), `gpu` the one that compares on a GPU (`triton_kernel`, `triton_parts`); both count NaN
and Inf of the reference by `unlike`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from divergence.errors import AlignmentError

if TYPE_CHECKING:
    import torch

    from divergence.comparison.metrics import Metrics
    from divergence.comparison.views import Values

__all__ = ["compare_tensors", "on_device"]

BROUGHT = 256 << 20
"""Most bytes of a tensor that is brought to a device to be compared there."""

_device: torch.device | None = None


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Has tensors of the host compared on a CUDA device for the duration, as far as they fit: where a model
    runs on one anyway, nobody need wait two seconds for the library that compares on the CPU."""
    global _device  # noqa: PLW0603 - threads compare too
    before, _device = _device, device if _has_triton() else None
    try:
        yield
    finally:
        _device = before


def compare_tensors(
    ref: Values, cand: Values, *, axes: tuple[str, ...] = (), mask: Values | None = None
) -> Metrics:
    """Compares a candidate tensor with its reference, exactly and in one pass.

    Two tensors on one CUDA device are compared there, with Triton, and nothing but results is copied to the
    host; tensors of the host are brought there within `on_device`. Where there is no Triton, and for what
    its kernel does not read (several head axes that are not one in memory), the CPU compares copies, a box
    at a time. The sums of both agree to a relative 1e-12.

    Args:
        ref: the reference: a torch tensor or numpy array of real numbers, on any device, of any
            strides, memory-mapped or not.
        cand: the candidate; another dtype or device is fine, another shape is not.
        axes: a name for each axis, from `batch`, `head`, `token`, `channel`. Without names the last
            axis is the channel, the one before it the token, the first of the rest the batch; what
            is left between batch and token counts as heads.
        mask: `[batch, token]`, True where a token is valid; all are if there is none. Padded tokens
            count for `padded_max_abs` and `bit_equal` only.

    Returns:
        The metrics; `divergence.comparison.metrics` defines each.

    Raises:
        AlignmentError: the shapes differ, there are no elements, the names or the mask do not fit,
            or the values are not real numbers.
    """
    _check_values(reference=ref, candidate=cand)
    if _on_one_gpu(ref, cand):
        from divergence.comparison import gpu

        return gpu.compare(ref, cand, axes=axes, mask=mask)
    if _device is not None:
        compared = _compared_there(_device, ref, cand, axes, mask)
        if compared is not None:
            return compared
    from divergence.comparison import cpu

    return cpu.compare(ref, cand, axes=axes, mask=mask)


def _check_values(**sides: Values) -> None:
    for name, values in sides.items():
        for kind in ("meta", "nested", "sparse"):
            if getattr(values, f"is_{kind}", False):
                raise AlignmentError(
                    f"the {name} is a {kind} tensor, whose values cannot be compared one by one; give one "
                    "that holds them all"
                )


def _compared_there(
    device: torch.device, ref: Values, cand: Values, axes: tuple[str, ...], mask: Values | None
) -> Metrics | None:
    """As `compare_tensors`, on `device`; None for what is not brought there."""
    import torch

    from divergence.comparison import gpu
    from divergence.shards import release

    if not (isinstance(ref, torch.Tensor) and isinstance(cand, torch.Tensor)):
        return None
    away = [side for side in (ref, cand) if not side.is_cuda]
    if any(not side.is_cpu or side.nbytes > BROUGHT for side in away):
        return None
    lying = ref.device if ref.is_cuda else cand.device if cand.is_cuda else device
    try:
        there = ref.to(lying), cand.to(lying)
        for side in away:
            release(side)
        return gpu.compare(*there, axes=axes, mask=mask)
    except torch.OutOfMemoryError:  # models and engines have taken it all
        return None


def _on_one_gpu(ref: Values, cand: Values) -> bool:
    """Whether both are tensors on one CUDA device, and there is Triton to compare them there."""
    device = getattr(ref, "device", None)
    return (
        getattr(device, "type", "cpu") == "cuda" and device == getattr(cand, "device", None) and _has_triton()
    )


def _has_triton() -> bool:
    return find_spec("triton") is not None
