"""Weights, keys and values, or operands of products that went through an 8-bit float."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from divergence.diagnosis import quantised, weights
from divergence.diagnosis.case import Case
from divergence.diagnosis.hypotheses import Trial

ID = "quant_fp8"

_FORMATS = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}


def trials(case: Case) -> Iterator[Trial]:
    """Each weight, then all, in e4m3 and e5m2, scaled to the format's range or not; the cache; weights and
    inputs of products."""
    for words, parts in weights.scopes(case):
        for name, (dtype, largest) in _FORMATS.items():
            for grain in ("tensor", "output channel", "nothing"):
                outputs = weights.output_axis(case, parts[0].name)
                how = "without a scale" if grain == "nothing" else f"with one scale for every {grain}"
                yield Trial(
                    key=f"{words} {name} {grain}",
                    title=f"{words} went through float8 {name} {how}",
                    fault=weights.fault(parts, rounded(dtype, largest, grain, outputs)),
                    parameters={
                        "format": name,
                        "scale per": grain,
                        "parameters": [str(p) for p in parts],
                    },
                    fix=f"leave {words} in fp16, or scale every output channel by itself: check the "
                    "calibration and the "
                    "layers excluded from fp8",
                )
    for name, (dtype, largest) in _FORMATS.items():
        cast = partial(_cast, dtype, largest)
        yield from quantised.trials(
            case,
            quantised.Format(
                f"float8 {name}",
                quantised.scaled(largest, cast),
                "scale keys, values and inputs to the format's range, each head or token by itself",
                cast,
            ),
            multiplied=name == "e4m3",  # e5m2 is for gradients
        )


def _cast(dtype: torch.dtype, largest: float, tensor: Tensor) -> Tensor:
    return tensor.clamp(-largest, largest).to(dtype).to(tensor.dtype)


def rounded(dtype: torch.dtype, largest: float, grain: str, outputs: int = 0) -> Callable[[Tensor], Tensor]:
    """Rounding to `dtype` with the largest value of the tensor, or of each output channel, at `largest`."""

    def function(weight: Tensor) -> Tensor:
        if grain == "nothing":
            return _cast(dtype, largest, weight)
        size = weight.abs().max() if grain == "tensor" else weight.abs().amax(1 - outputs, keepdim=True)
        scale = size.clamp(min=1e-30) / largest
        return (weight / scale).to(dtype).to(weight.dtype) * scale

    return function
