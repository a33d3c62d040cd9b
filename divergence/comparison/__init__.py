"""Comparison: how two tensors differ.

`metrics` holds the definitions, `cpu` the implementation that compares on the CPU with a compiled kernel
(`kernel`, `loops`), `gpu` the one that compares on a GPU (`triton_kernel`, `triton_parts`).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from divergence.comparison.metrics import Metrics
    from divergence.comparison.views import Values

__all__ = ["compare_tensors"]


def compare_tensors(
    ref: Values, cand: Values, *, axes: tuple[str, ...] = (), mask: Values | None = None
) -> Metrics:
    """Compares a candidate tensor with its reference, exactly and in one pass.

    Two tensors on one CUDA device are compared there, with Triton, and nothing but results is copied to the
    host. Where there is no Triton, and for what its kernel does not read (several head axes that are not one
    in memory), the CPU compares copies, a box at a time. The sums of both agree to a relative 1e-12.

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
    if _on_one_gpu(ref, cand):
        from divergence.comparison import gpu

        return gpu.compare(ref, cand, axes=axes, mask=mask)
    from divergence.comparison import cpu

    return cpu.compare(ref, cand, axes=axes, mask=mask)


def _on_one_gpu(ref: Values, cand: Values) -> bool:
    """Whether both are tensors on one CUDA device, and there is Triton to compare them there."""
    device = getattr(ref, "device", None)
    return (
        getattr(device, "type", "cpu") == "cuda"
        and device == getattr(cand, "device", None)
        and find_spec("triton") is not None
    )
