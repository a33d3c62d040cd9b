"""Weights that went through int8."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from divergence.diagnosis import weights
from divergence.diagnosis.case import Case
from divergence.diagnosis.hypotheses import Trial

ID = "quant_int8"


def trials(case: Case) -> Iterator[Trial]:
    """Each weight, then all, with one step for the tensor, an output channel, or an input channel."""
    for words, parts in weights.scopes(case):
        named = weights.parameters(case)
        for grain, axis in (("tensor", None), ("output channel", 1), ("input channel", 0)):
            for levels in (127.0, 128.0):
                function = rounded(axis, levels, [weights.output_axis(case, p.name) for p in parts][0])
                yield Trial(
                    key=f"{words} {grain} {levels:g}",
                    title=f"{words} went through int8 with one step for every {grain}",
                    fault=weights.fault(parts, function),
                    parameters=lambda _, grain=grain, levels=levels, parts=parts, named=named: {
                        "per": grain,
                        "per_tensor": grain == "tensor",
                        "step": float(parts[0].of(named[parts[0].name].detach()).abs().max()) / levels,
                        "parameters": [str(p) for p in parts],
                    },
                    fix=f"quantise {words} with one scale for every output channel, or leave it in fp16: calibrate on real "
                    "inputs, and exclude the layer from quantisation",
                )


def rounded(axis: int | None, levels: float, outputs: int = 0) -> Callable[[Tensor], Tensor]:
    """Symmetric rounding to integers up to 127.

    Args:
        axis: None for one step; 1 for one for every output channel, 0 for every input channel, of a weight
            `[out, in]`.
        levels: how many steps the largest value has.
        outputs: the axis of the outputs, 1 for a weight `[in, out]`.
    """

    def function(weight: Tensor) -> Tensor:
        if axis is None:
            largest = weight.abs().max()
        else:
            largest = weight.abs().amax(axis if outputs == 0 else 1 - axis, keepdim=True)
        step = largest.clamp(min=1e-30) / levels
        return (weight / step).round().clamp(-128 if levels == 128 else -127, 127) * step

    return function
