"""Weights, keys and values, or operands of products that went through int8."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from divergence.diagnosis import fixed, grids, quantised, weights
from divergence.diagnosis.case import Case
from divergence.diagnosis.hypotheses import Trial

if TYPE_CHECKING:
    from torch import Tensor

ID = "quant_int8"


def trials(case: Case) -> Iterator[Trial]:
    """Each weight, then all, with one step for the tensor, an output channel, or an input channel; the cache;
    weights and inputs of products."""
    named = weights.parameters(case)
    for words, parts in weights.scopes(case):
        outputs = weights.output_axis(case, parts[0].name)
        if not case.nonfinite and not quantised.comparable(
            case, weights.fault(parts, rounded(1, 127.0, outputs))
        ):
            continue
        for grain, function, levels in _ways(case, parts, outputs):
            yield Trial(
                key=f"{words} {grain} {levels:g}",
                title=f"{words} went through int8 with one step{grain}",
                fault=weights.fault(parts, function),
                parameters={
                    "per": grain.rpartition(" every ")[2],
                    "per_tensor": grain.endswith(" every tensor"),
                    "step": float(parts[0].of(named[parts[0].name].detach()).abs().max()) / levels,
                    "parameters": [str(p) for p in parts],
                },
                fix=f"quantise {words} with one scale for every output channel, or leave it in fp16: "
                "calibrate on real inputs, and exclude the layer from quantisation",
            )
    yield from fixed.trials(case, _INT8)
    yield from _four_bits(case)


def _ways(
    case: Case, parts: list[weights.Part], outputs: int
) -> Iterator[tuple[str, Callable[[Tensor], Tensor], float]]:
    """What shares a step, how it is rounded, and how many steps the largest value has."""
    for grain, axis in (("tensor", None), ("output channel", 1), ("input channel", 0)):
        for levels in (127.0,) if axis == 0 else (127.0, 128.0):
            yield f" for every {grain}", rounded(axis, levels, outputs), levels
    shifted = quantised.shifted(8)
    yield " and a zero point for every tensor", lambda w: shifted(w, quantised.every_axis(w), None), 127.0
    channels = partial(quantised.in_groups, lambda groups: shifted(groups, (-1,), None), None, outputs)
    yield " and a zero point for every output channel", channels, 127.0
    for size in quantised.group_sizes(case, parts, _GROUPS, outputs):
        groups = partial(quantised.in_groups, lambda g: quantised.integers(8)(g, (-1,), None), size, outputs)
        yield f" for every {size} inputs of an output channel", groups, 127.0


def _four_bits(case: Case) -> Iterator[Trial]:
    """Weights in groups of inputs, and the cache, in int4."""
    yield from fixed.kept(case, _INT4)
    if not quantised.is_possible(case, _LEAST_OF_FOUR_BITS):
        return
    yield from quantised.cached(case, _INT4)
    yield from fixed.shown(case, _INT4)
    for words, parts in weights.scopes(case):
        outputs = weights.output_axis(case, parts[0].name)
        whole = weights.fault(parts, partial(quantised.in_groups, _GROUPED[""], None, outputs))
        if not quantised.comparable(case, whole):
            continue
        yield Trial(
            key=f"{words} int4 tensor",
            title=f"{words} went through int4 with one step for every tensor",
            fault=weights.fault(parts, lambda w: _INT4.rounded(w, quantised.every_axis(w), None)),
            parameters={"bits": 4, "per": "tensor", "parameters": [str(part) for part in parts]},
            fix=f"quantise {words} in groups of inputs, or to 8 bits",
        )
        for size in (*quantised.group_sizes(case, parts, _GROUPS, outputs), None):
            for how, function in _GROUPED.items():
                grain = "output channel" if size is None else f"{size} inputs of an output channel"
                yield Trial(
                    key=f"{words} int4 {size} {how}",
                    title=f"{words} went through int4 with one step{how} for every {grain}",
                    fault=weights.fault(parts, partial(quantised.in_groups, function, size, outputs)),
                    parameters={
                        "bits": 4,
                        "per": grain,
                        "zero point": bool(how),
                        "parameters": [str(part) for part in parts],
                    },
                    fix=f"quantise {words} in smaller groups, or to 8 bits, or leave the layer out",
                )


_LEAST_OF_FOUR_BITS = 0.01
_GROUPS = (128, 64, 32, 16)
_GROUPED: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda groups: quantised.integers(4)(groups, (-1,), None),
    " and a zero point": lambda groups: quantised.shifted(4)(groups, (-1,), None),
}
_INT8 = quantised.Format(
    "int8",
    quantised.integers(8),
    "calibrate on real inputs, with a scale for every token or channel",
    shifted=quantised.shifted(8),
    grid=grids.integers,
    steps=(16, 255),
)
_INT4 = quantised.Format("int4", quantised.integers(4), "keep 8 bits", grid=grids.integers, steps=(1, 15))


def rounded(axis: int | None, levels: float, outputs: int = 0) -> Callable[[Tensor], Tensor]:
    """Symmetric rounding to integers up to 127.

    Args:
        axis: None for one step; 1 for one for every output channel, 0 for every input channel, of a weight
            `[out, in]`.
        levels: how many steps the largest value has.
        outputs: the axis of the outputs, 1 for a weight `[in, out]`.
    """
    least = -128 if levels == 128 else -127
    symmetric = quantised.scaled(levels, lambda steps: steps.round().clamp(least, 127))
    along = None if axis is None else (axis if outputs == 0 else 1 - axis,)
    return lambda weight: symmetric(weight, quantised.every_axis(weight) if along is None else along, None)
