"""What poisoned buffers tell: which elements an engine never wrote, and which changed from run to run."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from divergence.precision import integers_of

NAN_BYTE = 0xFF
"""Every float of all-one bytes is NaN, in fp32, fp16, bf16 and fp8 (e4m3 and e5m2)."""

OTHER_BYTE = 0xA5


def differences(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Number of elements whose bits differ, by output; those of equal bits are left out."""
    found = {}
    for name, tensor in a.items():
        one, other = _words(tensor), _words(b[name])
        if not torch.equal(one, other):
            found[name] = int((one != other).sum())
    return found


def unwritten(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Number of elements that the engine never wrote, by output: those that still hold the poison of
    both runs.

    Args:
        first: outputs of a run poisoned with `NAN_BYTE`.
        second: outputs of one poisoned with `OTHER_BYTE`.
    """
    found = {}
    for name, tensor in first.items():
        held = _words(tensor) == _word(NAN_BYTE, tensor.itemsize)
        if not held.any():
            continue
        count = int((held & (_words(second[name]) == _word(OTHER_BYTE, tensor.itemsize))).sum())
        if count:
            found[name] = count
    return found


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of `tensor` as integers of the same bits: one number each, to compare at once."""
    return tensor.contiguous().reshape(-1).view(integers_of(tensor.itemsize))


def _word(byte: int, size: int) -> int:
    """An element of `size` times that byte."""
    return int.from_bytes(bytes([byte]) * size, "little", signed=True)
