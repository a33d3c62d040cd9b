"""Number formats of few bits wherever they may be. A step or range that was fixed beforehand is read from
what the candidate shows: keys and values, or weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from divergence.diagnosis import cache, weights
from divergence.diagnosis.hypotheses import Trial
from divergence.diagnosis.quantised import OF_A_CACHE, Axes, Format, cached, is_possible, products_in

if TYPE_CHECKING:
    from torch import Tensor

    from divergence.diagnosis.case import Case

_GROUPS = (128, 64, 32, 16)
_SAMPLED = 64  # rows or columns of a weight that are looked at
_ALL = slice(None)


def trials(case: Case, format_: Format, *, multiplied: bool = True) -> Iterator[Trial]:
    """Weights that the candidate keeps in the format; keys and values; then, if it is a format that is
    `multiplied`, weights and inputs of products."""
    yield from kept(case, format_)
    possible = is_possible(case)
    if possible:
        yield from cached(case, format_)
    yield from shown(case, format_)
    if possible and multiplied:
        yield from products_in(case, format_)


def shown(case: Case, format_: Format) -> Iterator[Trial]:
    """Keys and values whose values are the format's, whatever range it was given."""
    names = [n for n in ("key", "value") if n in case.failing and case.clean[n].dim() == 4]
    if case.tensor not in names or case.nonfinite:
        return
    for grain, axes in OF_A_CACHE:
        found = {name: format_.grid_of(case.candidate[name], axes) for name in names}
        grids = {name: grid for name, grid in found.items() if grid is not None}
        if case.tensor not in grids:
            continue
        first = grids[case.tensor]
        beyond = first.beyond(case.clean[case.tensor])
        steps, words = first.step.flatten(), " and ".join(f"{name}s" for name in grids)
        step = float(steps.median())
        if beyond and format_.largest is not None:
            step = max(float(first.high.max()), -float(first.low.min())) / format_.largest
        size = f"of {step:.4g}" if len(steps) == 1 else f"for every {grain}, {step:.4g} in the middle,"
        size = f"{format_.unit} {size}"
        range_ = f"{float(first.low.min()):.4g} to {float(first.high.max()):.4g}"
        cut = f" and cut off {100 * beyond:.2g} % of the {case.tensor}s, those outside of {range_}"
        yield Trial(
            key=f"shown {format_.words} {grain}",
            title=f"{words} went through {format_.words} with a {size} that does not follow their range"
            f"{cut if beyond else ''}",
            fault=cache.changed(
                case,
                {name: grid.of for name, grid in grids.items()},
                read="hidden" in case.failing or "hidden" not in case.error,
            ),
            parameters={
                "format": format_.words,
                "tensors": list(grids),
                "per": grain,
                "per_tensor": grain == "tensor",
                "step": step,
                "beyond": beyond,
            },
            fix="calibrate on inputs like these, or take the range from the keys and values themselves, with "
            "one step for every token or head",
        )


def kept(case: Case, format_: Format) -> Iterator[Trial]:
    """Weights that the candidate itself keeps in the format, whatever step or range it was given."""
    named = weights.parameters(case)
    found: dict[str, _Kept] = {}
    for name, own in weights.held(case, weights.touched(case)).items():
        read = _read_from(format_, named[name].detach(), own, weights.output_axis(case, name))
        if read is not None:
            found[name] = read
    for names in weights.each_and_all(list(found)):
        first = found[names[0]]
        beyond = max(found[name].beyond for name in names)
        yield Trial(
            key=f"own {format_.words} {' '.join(names)}",
            title=f"{weights.spelt(names)} went through {format_.words} with a fixed {format_.unit} for "
            f"every {first.grain}, {first.step:.4g}"
            + (f", which cuts off {100 * beyond:.2g} % of the values" if beyond else ""),
            fault=weights.in_place(weights.held(case, names)),
            parameters={
                "format": format_.words,
                "parameters": names,
                "per": first.grain,
                "per_tensor": first.grain == "tensor",
                "step": first.step,
                "beyond": beyond,
            },
            fix=f"take the {format_.unit} from the largest value of every output channel, or leave the "
            "layer in fp16",
        )


@dataclass(frozen=True)
class _Kept:
    """How a weight was found in a format: what shares a step, the step in the middle, and the share of the
    reference's values that lie beyond its range."""

    grain: str
    step: float
    beyond: float


def _read_from(format_: Format, reference: Tensor, own: Tensor, outputs: int) -> _Kept | None:
    if own.dim() != 2:
        return None
    if outputs:
        reference, own = reference.T, own.T
    rows, columns = (slice(None, None, -(-n // _SAMPLED)) for n in own.shape)
    length = own.shape[1]
    grains: list[tuple[str, Axes, int, tuple[slice, slice]]] = [
        ("tensor", (0, 1, 2), length, (rows, _ALL)),
        ("output channel", (1, 2), length, (rows, _ALL)),
        *((f"{n} inputs of an output channel", (2,), n, (rows, _ALL)) for n in _GROUPS if length % n == 0),
        ("input channel", (0,), 1, (_ALL, columns)),
    ]
    for grain, axes, size, part in grains:
        ours, theirs = (t[part].unflatten(1, (-1, size)) for t in (reference, own))
        grid = format_.grid_of(theirs, axes)
        if grid is not None:
            return _Kept(grain, float(grid.step.median()), grid.beyond(ours))
    return None
