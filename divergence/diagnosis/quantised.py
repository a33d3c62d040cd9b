"""Keys and values, and operands of products, that went through a number format of few bits, with steps that
follow their range."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from divergence.diagnosis import cache, grids, parts, products, weights
from divergence.diagnosis.case import Case
from divergence.diagnosis.embedded import embedded
from divergence.diagnosis.emulate import Fault
from divergence.diagnosis.grids import Grid
from divergence.diagnosis.hypotheses import Trial

_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)
_ALL_FLOATS = 16  # whole numbers up to here are values of e4m3

Axes = tuple[int, ...]
Rounded = Callable[[Tensor, Axes, Tensor | None], Tensor]
Way = tuple[str, Callable[[Tensor], Tensor]]

_LEAST, _MOST = 3e-4, 0.7
"""Relative errors that rounding to 8 bits can make."""

OF_A_CACHE: tuple[tuple[str, Axes], ...] = (
    ("tensor", (0, 1, 2, 3)),
    ("head", (0, 2, 3)),
    ("token of a head", (3,)),
    ("token", (1, 3)),
    ("channel of a head", (2,)),
)
"""Axes of `[batch, head, token, channel]` that share a step."""


_EVERY_PROJECTION = "every projection"


@dataclass(frozen=True)
class Format:
    """A number format.

    Attributes:
        words: its name.
        rounded: a tensor rounded with one step for what lies along the axes, by the range of the tensor
            itself or of another.
        fix: what to do instead.
        unscaled: a tensor rounded to the format's own values, where it has any.
        shifted: as `rounded`, with a zero point, where the format has one.
        grid: reads from a tensor the values that it takes, if they are the format's.
        largest: the largest value of a format of floats.
        steps: the least and the most steps that a largest value has in a format of integers.
    """

    words: str
    rounded: Rounded
    fix: str
    unscaled: Callable[[Tensor], Tensor] | None = None
    shifted: Rounded | None = None
    grid: Callable[[Tensor, Axes], Grid | None] = lambda *_: None
    largest: float | None = None
    steps: tuple[int, int] = (0, 255)

    def grid_of(self, tensor: Tensor, axes: Axes) -> Grid | None:
        """`grid`, where it has as many steps as the format."""
        found = self.grid(tensor, axes)
        if found is None or self.largest is not None:
            return found
        least, most = self.steps
        if not least <= found.levels <= most:
            return None
        # The small values of an 8-bit float are multiples of a step too; large integers are not all floats.
        sparser = found.levels > _ALL_FLOATS and any(grids.floats(tensor, axes, t) for t in _FLOATS)
        return None if sparser else found

    @property
    def unit(self) -> str:
        """What the values are multiples of: integers have a step, floats a scale."""
        return "step" if self.largest is None else "scale"


def is_possible(case: Case, least: float = _LEAST) -> bool:
    """Whether the error could be rounding to few bits, of a relative size of `least` on."""
    return not case.nonfinite and case.is_noise and least < case.size < _MOST


def cached(case: Case, format_: Format) -> Iterator[Trial]:
    """Keys and values in the cache, or only where attention reads them."""
    here = [n for n in ("key", "value") if n in case.clean and case.clean[n].dim() == 4]
    if case.tensor in here:
        names = [name for name in here if name in case.failing]
        read = "hidden" in case.failing or "hidden" not in case.error
        end = ", and attention reads them so" if read else " where they are handed out"
    elif case.tensor == "hidden" and here and not set(here) & set(case.failing):
        names, read, end = here, True, " where attention reads them"
    else:
        return
    words = "keys and values" if len(names) == 2 else f"{names[0]}s"
    ways: list[Way] = [(f"with one step for every {g}", partial(_along, format_, a)) for g, a in OF_A_CACHE]
    if format_.unscaled is not None:
        ways.insert(0, ("without a scale", format_.unscaled))
    handed_out = case.tensor != "hidden"
    faults = [
        cache.changed(case, dict.fromkeys(names, change), read=read, handed_out=handed_out)
        for _, change in ways
    ]
    if not handed_out and not comparable(case, faults[-1], _ALONE):
        return
    for (how, _), fault in zip(ways, faults, strict=True):
        yield Trial(
            key=f"cache {format_.words} {how}",
            title=f"{words} go through {format_.words} {how}{end}",
            fault=fault,
            parameters={"format": format_.words, "tensors": names, "scale": how},
            fix=f"keep the cache in the model's precision, or {format_.fix}; if {format_.words} is meant, "
            "give keys and values the tolerance that it needs",
        )


def _along(format_: Format, axes: Axes, tensor: Tensor) -> Tensor:
    return format_.rounded(tensor, axes, None)


def products_in(case: Case, format_: Format) -> Iterator[Trial]:
    """Weights and inputs of products; in the first layer with the embedding too."""
    before = list(_embedded(case, format_))
    yield from before
    for words, indices, alone in _scopes(case):
        ways = list(_ways(format_, alone=alone))
        (_, right), (_, left) = ways[0]
        if alone and not comparable(case, products.computed(indices, partial(_product, left, right)), _ALONE):
            continue
        for (grain, right), (per, left) in ways:
            fault = products.computed(indices, partial(_product, left, right))
            trial = Trial(
                key=f"{words} {format_.words} {grain} {per}",
                title=f"{words} ran in {format_.words}: weights {grain}, inputs {per}",
                fault=fault,
                parameters={"format": format_.words, "products": words, "weights": grain, "inputs": per},
                fix=f"leave {words} in the model's precision, or {format_.fix}",
            )
            yield trial
            for given in before if words == _EVERY_PROJECTION else ():
                assert isinstance(given.fault, Fault)
                yield replace(
                    trial,  # under the same key: no later layer is given an embedding
                    title=f"{given.title}; {trial.title}",
                    fault=replace(fault, hidden=given.fault.hidden),
                    parameters={**given.reported(0.0), **trial.reported(0.0)},
                )


def _embedded(case: Case, format_: Format) -> Iterator[Trial]:
    """The embedding, whose rows enter the first layer."""
    for found in embedded(case):
        for how, change in _of_table(format_, found.table):
            yield Trial(
                key=f"{found.name} {format_.words} {how}",
                title=f"the embedding went through {format_.words} with {how}",
                fault=found.changed(change),
                parameters={"format": format_.words, "embedding": how, "module": found.name},
                fix=f"leave the embedding in the model's precision, or {format_.fix}",
            )


def _of_table(format_: Format, table: Tensor) -> Iterator[Way]:
    """Rows rounded by the range of their whole table."""
    rounded, shifted = format_.rounded, format_.shifted
    yield "one step", lambda t: rounded(t, every_axis(t), table)
    if shifted is not None:
        yield "one step and a zero point", lambda t: shifted(t, every_axis(t), table)


def _ways(format_: Format, *, alone: bool) -> Iterator[tuple[Way, Way]]:
    """How weights and inputs are rounded; of a product alone only what is usual."""
    rounded, shifted = format_.rounded, format_.shifted
    whole: Way = ("with one step for every tensor", lambda t: rounded(t, every_axis(t), None))
    channel: Way = ("with one step for every output channel", lambda t: rounded(t, (-2,), None))
    inputs: list[Way] = [whole, ("with one step for every token", lambda t: rounded(t, (-1,), None))]
    if shifted is not None:
        inputs.append(
            ("with one step and a zero point for every tensor", lambda t: shifted(t, every_axis(t), None))
        )
    yield from ((channel, each) for each in inputs)
    yield whole, whole
    if alone:
        return
    if format_.unscaled is not None:
        inputs.append(("without a scale", format_.unscaled))
        yield channel, inputs[-1]
    yield from ((whole, each) for each in inputs[1:])
    yield from ((("as they are", lambda t: t), each) for each in inputs)


def every_axis(tensor: Tensor) -> Axes:
    """All axes of a tensor."""
    return tuple(range(tensor.dim()))


def _product(
    left: Callable[[Tensor], Tensor], right: Callable[[Tensor], Tensor], product: products.Product
) -> Tensor:
    return left(product.left) @ right(product.right)


def _scopes(case: Case) -> Iterator[tuple[str, list[int], bool]]:
    """All projections of the layer, those after attention, those of the MLP, and each that the site depends
    on alone: with words, numbers, and whether it is alone."""
    every = products.projections(case, of_site=False)
    yield _EVERY_PROJECTION, every, False
    contexts = [a.context for a in parts.attentions(case.trace)]
    after = [index for index in every if contexts and index > max(contexts)]
    if 1 < len(after) < len(every):
        yield "every projection after attention", after, False
    if 2 < len(after) < len(every):
        yield "every projection of the MLP", after[1:], False  # the first of these joins the heads
    if len(every) > 1:
        for index in products.projections(case):
            names = case.trace.operators[index].parameters
            yield f"the product with '{names[0]}'" if names else f"product {index}", [index], True


def scaled(largest: float, rounding: Callable[[Tensor], Tensor]) -> Rounded:
    """Rounding in units in which the largest magnitude is `largest`."""

    def rounded(tensor: Tensor, axes: Axes, of: Tensor | None) -> Tensor:
        size = tensor.abs().amax(axes, keepdim=True) if of is None else of.abs().max()
        step = size.clamp(min=1e-30) / largest
        return rounding(tensor / step) * step

    return rounded


def integers(bits: int) -> Rounded:
    """Symmetric rounding to integers of so many bits."""
    return scaled(float(2 ** (bits - 1) - 1), torch.round)


def shifted(bits: int) -> Rounded:
    """Rounding to integers of so many bits whose range, which holds zero, goes from the least to the largest
    value (with 8 bits what ONNX's DynamicQuantizeLinear does)."""
    last = 2**bits - 1

    def rounded(tensor: Tensor, axes: Axes, of: Tensor | None) -> Tensor:
        low, high = (
            (tensor.amin(axes, keepdim=True), tensor.amax(axes, keepdim=True))
            if of is None
            else (of.min(), of.max())
        )
        low, high = low.clamp(max=0), high.clamp(min=0)
        step = (high - low).clamp(min=1e-30) / last
        zero = (-low / step).round()
        steps: Tensor = ((tensor / step).round() + zero).clamp(0, last) - zero
        made: Tensor = steps * step
        return made

    return rounded


_COMPARABLE = 8.0  # an outlier makes a step for a whole tensor that much larger than one for a channel
_ALONE = 5.0  # of one product among many, a few ways are tried


def comparable(case: Case, fault: Fault, within: float = _COMPARABLE) -> bool:
    """Whether an emulated rounding makes an error of about the size that is there: others of the same tensors
    to as many bits are not worth a run otherwise."""
    made, there = float(case.emulated(fault).norm()), float(case.error[case.tensor].norm())
    return there / within < made < there * within


def in_groups(function: Callable[[Tensor], Tensor], size: int | None, outputs: int, weight: Tensor) -> Tensor:
    """`function` done to groups of inputs of a weight, along the last axis of `[out, group, inputs]`.

    Args:
        function: what to do.
        size: inputs of a group, None for all.
        outputs: the axis of the outputs.
        weight: of two axes; others are left alone.
    """
    if weight.dim() != 2:
        return weight
    rows = weight.T if outputs else weight
    made = function(rows.unflatten(1, (-1, size or rows.shape[1]))).flatten(1)
    return made.T if outputs else made


def group_sizes(case: Case, changed: Sequence[weights.Part], usual: Sequence[int], outputs: int) -> list[int]:
    """Usual lengths of groups that fit the inputs of weights and are not all of them."""
    lengths = [shape[1 - outputs] for shape in shapes_of(case, changed)]
    return [size for size in usual if lengths and not any(n % size or n == size for n in lengths)]


def shapes_of(case: Case, changed: Sequence[weights.Part]) -> list[torch.Size]:
    """Shapes of the weights that have two axes."""
    named = weights.parameters(case)
    return [part.of(named[part.name]).shape for part in changed if named[part.name].dim() == 2]
