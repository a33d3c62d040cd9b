"""Bits written in one type and read as another: an output buffer, or a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from divergence.diagnosis import weights
from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Fault, Tensors
from divergence.diagnosis.hypotheses import Trial

ID = "dtype_misread"

_PAIRS = (
    ("bf16", torch.bfloat16, "fp16", torch.float16),
    ("fp16", torch.float16, "bf16", torch.bfloat16),
    ("fp32", torch.float32, "fp16", torch.float16),
    ("fp32", torch.float32, "bf16", torch.bfloat16),
    ("fp16", torch.float16, "fp32", torch.float32),
    ("bf16", torch.bfloat16, "fp32", torch.float32),
)


def trials(case: Case) -> Iterator[Trial]:
    """The candidate's outputs read in another type; then each weight."""
    for written, source, read, target in _PAIRS:
        misread = reinterpreted(source, target)
        yield Trial(
            key=f"outputs {written} {read}",
            title=f"the outputs were written as {written} and read as {read}",
            fault=Fault(outputs=_outputs(case, misread)),
            parameters={"written": written, "read": read},
            fix=f"allocate the output buffer in the engine's own type ({written}): set the network's "
            "output types, and read "
            "engine.get_tensor_dtype on the host",
        )
    for part in weights.matrices(case):
        for written, source, read, target in _PAIRS[:2]:
            yield Trial(
                key=f"{part} {written} {read}",
                title=f"'{part}' was stored as {written} and loaded as {read}",
                fault=weights.fault([part], reinterpreted(source, target)),
                parameters={
                    "parameter": str(part),
                    "written": written,
                    "read": read,
                },
                fix=f"load '{part.name}' as {written}: check the dtype in the checkpoint's header against "
                "the converter's",
                exact=lambda _: True,
            )


def reinterpreted(written: torch.dtype, read: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The bits of a tensor in `written`, taken as `read`; of more elements than the tensor has the first,
    of fewer all, then zeros. What is not a number becomes 0."""

    def function(tensor: Tensor) -> Tensor:
        bits = tensor.to(written).contiguous().reshape(-1).view(read).to(tensor.dtype)
        count = tensor.numel()
        if bits.numel() < count:
            bits = torch.cat((bits, bits.new_zeros(count - bits.numel())))
        return bits[:count].reshape(tensor.shape).nan_to_num()

    return function


def _outputs(case: Case, function: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: function(t) if n in case.failing else t for n, t in tensors.items()}
