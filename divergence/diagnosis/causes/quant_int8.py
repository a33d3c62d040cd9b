"""Weights, keys and values, or operands of products that went through int8."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from divergence.diagnosis import quantised, weights
from divergence.diagnosis.case import Case
from divergence.diagnosis.hypotheses import Trial

if TYPE_CHECKING:
    from torch import Tensor

ID = "quant_int8"


def trials(case: Case) -> Iterator[Trial]:
    """Each weight, then all, with one step for the tensor, an output channel, or an input channel; the cache;
    weights and inputs of products."""
    for words, parts in weights.scopes(case):
        named = weights.parameters(case)
        for grain, axis in (("tensor", None), ("output channel", 1), ("input channel", 0)):
            for levels in (127.0, 128.0):
                function = rounded(axis, levels, weights.output_axis(case, parts[0].name))
                yield Trial(
                    key=f"{words} {grain} {levels:g}",
                    title=f"{words} went through int8 with one step for every {grain}",
                    fault=weights.fault(parts, function),
                    parameters={
                        "per": grain,
                        "per_tensor": grain == "tensor",
                        "step": float(parts[0].of(named[parts[0].name].detach()).abs().max()) / levels,
                        "parameters": [str(p) for p in parts],
                    },
                    fix=f"quantise {words} with one scale for every output channel, or leave it in fp16: "
                    "calibrate on real "
                    "inputs, and exclude the layer from quantisation",
                )
    yield from quantised.trials(case, _INT8)
    yield from _four_bits(case)


def _four_bits(case: Case) -> Iterator[Trial]:
    """Weights in groups of inputs, and the cache, in int4."""
    if not quantised.is_possible(case, _LEAST_OF_FOUR_BITS):
        return
    yield from quantised.cached(case, _INT4)
    named = weights.parameters(case)
    for words, parts in weights.scopes(case):
        outputs = weights.output_axis(case, parts[0].name)
        lengths = [
            part.of(named[part.name]).shape[1 - outputs] for part in parts if named[part.name].dim() == 2
        ]
        for size in (*_GROUPS, None):
            if size is not None and (
                not lengths or any(length % size or length == size for length in lengths)
            ):
                continue
            for how, function in _GROUPED.items():
                grain = "output channel" if size is None else f"{size} inputs of an output channel"
                yield Trial(
                    key=f"{words} int4 {size} {how}",
                    title=f"{words} went through int4 with one step{how} for every {grain}",
                    fault=weights.fault(parts, partial(_in_groups, function, size, outputs)),
                    parameters={
                        "bits": 4,
                        "per": grain,
                        "zero point": bool(how),
                        "parameters": [str(part) for part in parts],
                    },
                    fix=f"quantise {words} in smaller groups, or to 8 bits, or leave the layer out",
                )


def _in_groups(
    function: Callable[[Tensor], Tensor], size: int | None, outputs: int, weight: Tensor
) -> Tensor:
    """`function` done to groups of inputs of a weight, along the last axis of `[out, group, inputs]`."""
    if weight.dim() != 2:
        return weight
    rows = weight.T if outputs else weight
    made = function(rows.unflatten(1, (-1, size or rows.shape[1]))).flatten(1)
    return made.T if outputs else made


_LEAST_OF_FOUR_BITS = 0.01
_GROUPS = (128, 64, 32)
_GROUPED: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda groups: quantised.integers(4)(groups, (-1,), None),
    " and a zero point": lambda groups: quantised.shifted(4)(groups, (-1,), None),
}
_INT8 = quantised.Format(
    "int8",
    quantised.integers(8),
    "calibrate on real inputs, with a scale for every token or channel",
    shifted=quantised.shifted(8),
)
_INT4 = quantised.Format("int4", quantised.integers(4), "keep 8 bits")


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
