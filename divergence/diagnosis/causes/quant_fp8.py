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

_NEAR = 3.0  # floats are rounded by about as much whatever shares a scale
_GROUPS = (128, 32)
_SIDES = (128, 64, 32)
_FORMATS = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}


def trials(case: Case) -> Iterator[Trial]:
    """Each weight, then all, in e4m3 and e5m2, scaled to the format's range or not; the cache; weights and
    inputs of products."""
    for words, parts in weights.scopes(case):
        for name, (dtype, largest) in _FORMATS.items():
            outputs = weights.output_axis(case, parts[0].name)
            first = weights.fault(parts, rounded(dtype, largest, "output channel", outputs))
            if not case.nonfinite and not quantised.comparable(case, first, _NEAR):
                continue
            fitting = quantised.group_sizes(case, parts, _GROUPS, outputs) if name == "e4m3" else []
            grains = [f"{size} inputs of an output channel" for size in fitting]
            grains += [f"block of {size} by {size}" for size in _blocks(case, parts) if name == "e4m3"]
            channel = ["output channel"] if name == "e4m3" else []
            for grain in ("tensor", *channel, "nothing", *grains):
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
                    "calibration and the layers excluded from fp8",
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


def _blocks(case: Case, parts: list[weights.Part]) -> list[int]:
    """Sides of square blocks that fit weights."""
    named = weights.parameters(case)
    shapes = [tuple(part.of(named[part.name]).shape) for part in parts if named[part.name].dim() == 2]
    return [
        side
        for side in _SIDES
        if shapes and not any(n % side for shape in shapes for n in shape) and (side, side) not in shapes
    ]


def _cast(dtype: torch.dtype, largest: float, tensor: Tensor) -> Tensor:
    return tensor.clamp(-largest, largest).to(dtype).to(tensor.dtype)


def rounded(dtype: torch.dtype, largest: float, grain: str, outputs: int = 0) -> Callable[[Tensor], Tensor]:
    """Rounding to `dtype` with the largest value of the tensor, or of each output channel, or of a group of
    inputs of each, at `largest`."""
    side = grain.rpartition(" by ")[2] if grain.startswith("block") else ""
    if side:
        return partial(_in_blocks, quantised.scaled(largest, partial(_cast, dtype, largest)), int(side))
    size = grain.removesuffix(" inputs of an output channel")
    if size.isdecimal():
        scaled = quantised.scaled(largest, partial(_cast, dtype, largest))
        return partial(quantised.in_groups, lambda g: scaled(g, (-1,), None), int(size), outputs)

    def function(weight: Tensor) -> Tensor:
        if grain == "nothing":
            return _cast(dtype, largest, weight)
        size = weight.abs().max() if grain == "tensor" else weight.abs().amax(1 - outputs, keepdim=True)
        scale = size.clamp(min=1e-30) / largest
        return (weight / scale).to(dtype).to(weight.dtype) * scale

    return function


def _in_blocks(function: quantised.Rounded, side: int, weight: Tensor) -> Tensor:
    """`function` done to square blocks of a weight of two axes."""
    if weight.dim() != 2:
        return weight
    blocks = weight.unflatten(1, (-1, side)).unflatten(0, (-1, side))
    return function(blocks, (1, 3), None).flatten(2).flatten(0, 1)
