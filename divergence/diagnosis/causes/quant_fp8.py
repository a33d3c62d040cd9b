"""Weights, keys and values, or operands of products that went through an 8-bit float."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from divergence.diagnosis import fixed, grids, quantised, weights
from divergence.diagnosis.case import Case
from divergence.diagnosis.hypotheses import Trial

ID = "quant_fp8"

_NEAR = 3.0  # floats are rounded by about as much whatever shares a scale
_GROUPS = (128, 32)
_SIDES = (128, 64, 32)


def _format(name: str, dtype: torch.dtype) -> quantised.Format:
    largest = torch.finfo(dtype).max

    def cast(tensor: Tensor) -> Tensor:
        return tensor.clamp(-largest, largest).to(dtype).to(tensor.dtype)

    return quantised.Format(
        f"float8 {name}",
        quantised.scaled(largest, cast),
        "scale keys, values and inputs to the format's range, each head or token by itself",
        cast,
        grid=partial(grids.floats, dtype=dtype),
        largest=largest,
    )


_FORMATS = {
    "e4m3": _format("e4m3", torch.float8_e4m3fn),
    "e5m2": _format("e5m2", torch.float8_e5m2),
}


def trials(case: Case) -> Iterator[Trial]:
    """Each weight, then all, in e4m3 and e5m2, scaled to the format's range or not; the cache; weights and
    inputs of products."""
    for words, parts in weights.scopes(case):
        for name, format_ in _FORMATS.items():
            outputs = weights.output_axis(case, parts[0].name)
            first = weights.fault(parts, _by_channel(format_, outputs))
            if not case.nonfinite and not quantised.comparable(case, first, _NEAR):
                continue
            for grain, function in _ways(case, parts, name, outputs):
                how = "without a scale" if grain == "nothing" else f"with one scale for every {grain}"
                yield Trial(
                    key=f"{words} {name} {grain}",
                    title=f"{words} went through float8 {name} {how}",
                    fault=weights.fault(parts, function),
                    parameters={
                        "format": name,
                        "scale per": grain,
                        "parameters": [str(p) for p in parts],
                    },
                    fix=f"leave {words} in fp16, or scale every output channel by itself: check the "
                    "calibration and the layers excluded from fp8",
                )
    for name, format_ in _FORMATS.items():
        # e5m2 is for gradients
        yield from fixed.trials(case, format_, multiplied=name == "e4m3")


def _ways(
    case: Case, parts: list[weights.Part], name: str, outputs: int
) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """What shares a scale, and how it is rounded."""
    format_ = _FORMATS[name]
    rounded, unscaled = format_.rounded, format_.unscaled
    assert unscaled is not None
    yield "tensor", lambda w: rounded(w, quantised.every_axis(w), None)
    yield "output channel", _by_channel(format_, outputs)
    yield "nothing", unscaled
    if name == "e4m3":
        for size in quantised.group_sizes(case, parts, _GROUPS, outputs):
            groups = partial(quantised.in_groups, lambda g: rounded(g, (-1,), None), size, outputs)
            yield f"{size} inputs of an output channel", groups
        for side in _blocks(case, parts):
            yield f"block of {side} by {side}", partial(_in_blocks, rounded, side)


def _by_channel(format_: quantised.Format, outputs: int) -> Callable[[Tensor], Tensor]:
    return lambda weight: format_.rounded(weight, (1 - outputs,), None)


def _blocks(case: Case, parts: list[weights.Part]) -> list[int]:
    """Sides of square blocks that fit weights."""
    shapes = quantised.shapes_of(case, parts)
    return [
        side
        for side in _SIDES
        if shapes and not any(n % side for shape in shapes for n in shape) and (side, side) not in shapes
    ]


def _in_blocks(function: quantised.Rounded, side: int, weight: Tensor) -> Tensor:
    """`function` done to square blocks of a weight of two axes."""
    if weight.dim() != 2:
        return weight
    blocks = weight.unflatten(1, (-1, side)).unflatten(0, (-1, side))
    return function(blocks, (1, 3), None).flatten(2).flatten(0, 1)
