"""The weights of a unit, fused projections taken apart into query, key and value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Change, Fault
from divergence.diagnosis.own import is_same
from divergence.diagnosis.trace import PIECES
from divergence.sites import KEYS_AND_VALUES

if TYPE_CHECKING:
    from torch import Tensor

    from divergence.diagnosis.trace import Call

_NEARER = 0.7  # half of the squared difference explained
_PRODUCTS = ("linear", "addmm", "matmul", "conv1d")


@dataclass(frozen=True)
class Part:
    """A parameter, or the rows of one that make the query, the key or the value.

    Attributes:
        name: of the parameter within the unit.
        role: `query`, `key` or `value` where it is a part of a fused one, else "".
        axis: along which the parts lie: that of the outputs.
        start, stop: the part, all of it where `stop` is None.
        groups: how many times the rows begin anew: 1 where all queries lie before all keys, the number of
            heads of keys where each has its own queries, key and value side by side.
    """

    name: str
    role: str = ""
    axis: int = 0
    start: int = 0
    stop: int | None = None
    groups: int = 1

    def __str__(self) -> str:
        return f"{self.name} ({self.role})" if self.role else self.name

    def of(self, parameter: Tensor) -> Tensor:
        """The rows of the part."""
        if self.stop is None:
            return parameter
        return parameter.index_select(self.axis, self._rows(parameter))

    def change(self, function: Callable[[Tensor], Tensor]) -> Change:
        """A change of the parameter that changes this part alone."""

        def changed(parameter: Tensor) -> Tensor:
            if self.stop is None:
                return function(parameter)
            rows = self._rows(parameter)
            made = function(self.of(parameter)).to(parameter.dtype)
            return parameter.index_copy(self.axis, rows, made)

        return changed

    def _rows(self, parameter: Tensor) -> Tensor:
        rows = torch.arange(parameter.shape[self.axis], device=parameter.device)
        return rows.view(self.groups, -1)[:, self.start : self.stop].flatten()


def fault(parts: list[Part] | tuple[Part, ...], function: Callable[[Tensor], Tensor]) -> Fault:
    """The fault of `function` done to every part."""
    return one_after_another((part.name, part.change(function)) for part in parts)


def one_after_another(changes: Iterable[tuple[str, Change]]) -> Fault:
    """The fault of changes of parameters by name, several of one parameter in their order."""
    made: dict[str, Change] = {}
    for name, change in changes:
        before = made.get(name)
        made[name] = change if before is None else _then(before, change)
    return Fault(parameters=made)


def _then(first: Change, second: Change) -> Change:
    return lambda parameter: second(first(parameter))


def matrices(case: Case) -> list[Part]:
    """The weights with two axes or more that the site depends on."""
    return [part for name in _named(case, 2) for part in _parts(case, name)]


def fused(parts: Iterable[Part]) -> list[Part]:
    """The whole weights of those that are parts of one."""
    return [Part(name) for name in dict.fromkeys(part.name for part in parts if part.role)]


def scopes(case: Case) -> list[tuple[str, list[Part]]]:
    """Weights that one fault may have changed, with a name: each alone, parts of a fused one and then all of
    it, then all matrices of the unit."""
    parts = matrices(case)
    each = [(f"'{part}'", [part]) for part in (*parts, *fused(parts))]
    named = parameters(case)
    every = [part for part in whole(case) if named[part.name].dim() >= 2]
    return [*each, ("every weight", every)] if len(every) > 1 else each


def whole(case: Case) -> list[Part]:
    """Every parameter of a layer, gains and biases too; outside the layers those that the site depends on."""
    return [
        Part(name)
        for name, parameter in parameters(case).items()
        if parameter.is_floating_point() and (case.is_layer or name in case.trace.reaching(case.tensor))
    ]


def biases(case: Case) -> list[Part]:
    """The biases that the site depends on."""
    found = [
        n for n in _named(case, 1) if "bias" in n.rpartition(".")[2] or n.rpartition(".")[2].startswith("b_")
    ]
    return [part for name in found for part in _parts(case, name)]


def gains(case: Case) -> list[Part]:
    """The gains of norms that the site depends on."""
    taken = {part.name for part in biases(case)}
    return [Part(n) for n in _named(case, 1) if n not in taken]


def projection(case: Case, tensor: str) -> Part | None:
    """The weight that a site's tensor is projected with: the last one on the way to it."""
    made = case.trace.sites.get(tensor)
    if made is None:
        return None
    named = parameters(case)
    for index in sorted(case.trace.ancestors(made), reverse=True):
        operator = case.trace.operators[index]
        for name in operator.parameters:
            if named[name].dim() == 2 and operator.name in _PRODUCTS:
                found = _all_parts(case, name)
                role = tensor.removeprefix("cross_")
                return next(
                    (part for part in found if part.role == role), found[0] if len(found) == 1 else None
                )
    return None


def bias_of(case: Case, part: Part) -> Part | None:
    """The bias that belongs to a weight."""
    path, _, leaf = part.name.rpartition(".")
    own = leaf.replace("weight", "bias") if "weight" in leaf else "bias"  # in_proj_weight, in_proj_bias
    name = f"{path}.{own}".lstrip(".")
    return replace(part, name=name, axis=0) if name in parameters(case) else None


def outputs_in_order(case: Case, part: Part, rows: Tensor) -> Fault:
    """The outputs of a weight, with its bias, in the order of `rows`."""
    axis, bias = output_axis(case, part.name), bias_of(case, part)
    return fault(
        [part] if bias is None else [part, bias],
        lambda w: w.index_select(axis if w.dim() > 1 else 0, rows.to(w.device)),
    )


def inputs_in_order(case: Case, part: Part, columns: Tensor) -> Fault:
    """The inputs of a weight in the order of `columns`."""
    axis = 1 - output_axis(case, part.name)
    return fault([part], lambda w: w.index_select(axis, columns.to(w.device)))


def parameters(case: Case) -> Mapping[str, Tensor]:
    """The unit's parameters by name."""
    return dict(case.unit.module.named_parameters())


def own(case: Case, name: str) -> Tensor | None:
    """The candidate's weight in the place of the unit's parameter `name`, or None where it shows none."""
    known = f"own {name}"
    if known not in case.memory:
        case.memory[known] = case.given.own(parameters(case)[name])
    found: Tensor | None = case.memory[known]
    return found


def is_untouched(case: Case, name: str) -> bool:
    """Whether the candidate is known to hold the reference's parameter `name`."""
    return _is_same(case, name) is True


def agrees(case: Case, fault: Fault) -> bool:
    """Whether what a fault makes of parameters could be what the candidate holds: nearer to it than the
    reference's are. What the candidate does not show could be anything."""
    named = parameters(case)
    for name, change in fault.parameters.items():
        shown = own(case, name)
        if shown is None:
            continue
        reference = named[name].detach()
        if _is_same(case, name):
            return False
        made = change(reference)
        if made.shape != shown.shape or _distance(made, shown) > _NEARER * _distance(reference, shown):
            return False
    return True


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm())


def touched(case: Case) -> list[str]:
    """Parameters that the site depends on and the candidate is known to hold others for."""
    reaching = case.trace.reaching(case.tensor)
    return [name for name in parameters(case) if name in reaching and _is_same(case, name) is False]


def _is_same(case: Case, name: str) -> bool | None:
    """Whether the candidate holds the parameter `name`; None where it shows none."""
    known = f"same {name}"
    if known not in case.memory:
        shown = own(case, name)
        case.memory[known] = None if shown is None else is_same(parameters(case)[name], shown)
    found: bool | None = case.memory[known]
    return found


def held(case: Case, names: Iterable[str]) -> dict[str, Tensor]:
    """The candidate's weights by name, those that it shows."""
    return {name: found for name in names if (found := own(case, name)) is not None}


def in_place(replacing: Mapping[str, Tensor]) -> Fault:
    """The fault of other weights in the place of the unit's."""
    return Fault(parameters={name: _instead(tensor) for name, tensor in replacing.items()})


def _instead(tensor: Tensor) -> Change:
    return lambda parameter: tensor.to(parameter.dtype)


def spelt(names: Sequence[str]) -> str:
    """Names of weights for a sentence."""
    return f"'{names[0]}'" if len(names) == 1 else f"{len(names)} weights ({', '.join(names)})"


def each_and_all(names: list[str]) -> list[list[str]]:
    """Every name alone, then all together."""
    return [[name] for name in names] + ([names] if len(names) > 1 else [])


def _named(case: Case, axes: int) -> list[str]:
    reaching = case.trace.reaching(case.tensor)
    return [
        name
        for name, parameter in parameters(case).items()
        if name in reaching and parameter.is_floating_point() and (parameter.dim() == 1) == (axes == 1)
    ]


def _parts(case: Case, name: str) -> list[Part]:
    """A fused projection of query, key and value in those parts that the site depends on."""
    found = _all_parts(case, name)
    role = case.tensor.removeprefix("cross_")
    if role in ("key", "value") and len(found) > 1:
        return [part for part in found if part.role == role]
    return found


def _all_parts(case: Case, name: str) -> list[Part]:
    """A fused projection of query, key and value in parts: what lies before the last two widths, of all
    rows or of those of a head, is the query."""
    names = next((pair for pair in KEYS_AND_VALUES if _makes(case, name, pair)), None)
    if names is None:
        return [Part(name)]
    key, value = (case.clean[t] for t in names)
    parameter = parameters(case)[name]
    axis = output_axis(case, name) if parameter.dim() == 2 else 0
    total = parameter.shape[axis]
    if (
        not _is_projection(case, name)
        or total <= key.shape[1] * key.shape[3] + value.shape[1] * value.shape[3]
    ):
        return [Part(name)]
    groups = _groups(case, name, total, names[1])
    width, heads = total // groups, value.shape[1] // groups
    stops = (width - (key.shape[3] + value.shape[3]) * heads, width - value.shape[3] * heads, width)
    starts = (0, *stops)
    return [
        Part(name, role, axis, starts[i], stops[i], groups)
        for i, role in enumerate(("query", "key", "value"))
    ]


def _makes(case: Case, name: str, names: tuple[str, str]) -> bool:
    """Whether the keys and values of these names show their heads and both depend on a parameter."""
    shown = all(t in case.clean and case.clean[t].dim() == 4 for t in names)
    return shown and all(name in case.trace.reaching(t) for t in names if t in case.trace.sites)


def _groups(case: Case, name: str, total: int, tensor: str) -> int:
    """Whether the rows of each head lie together: the number of heads then, else 1. It is seen from where
    the value (`tensor`) of a token comes from when the projection gives the numbers of its rows."""
    heads = case.clean[tensor].shape[1]
    known = f"groups {name}"
    if known not in case.memory:
        users = [
            o.index for o in case.trace.operators.values() if name in o.parameters and o.name in _PRODUCTS
        ]

        def numbered(call: Call) -> object:
            made = call.run()
            return torch.arange(total, device=made.device).to(made.dtype).expand(made.shape).contiguous()

        try:
            value = case.unit.run([Fault(operators=lambda: dict.fromkeys(users, numbered))])[tensor]
        except Exception:  # a model's code may not bear such numbers
            value = case.clean[tensor]
        together = False
        if heads > 1 and total % heads == 0:
            rows = torch.arange(total, device=value.device).to(value.dtype).view(heads, -1)
            together = torch.equal(value[0, :, 0], rows[:, -value.shape[-1] :])
        case.memory[known] = heads if together else 1
    found: int = case.memory[known]
    return found


def _is_projection(case: Case, name: str) -> bool:
    users = [o for o in case.trace.operators.values() if name in o.parameters]
    return bool(users) and all(
        o.name in (*_PRODUCTS, "getitem", "to", "float", "T", "t", "transpose", *PIECES) for o in users
    )


def output_axis(case: Case, name: str) -> int:
    """1 where the weight is `[in, out]` (GPT-2's Conv1D), else 0."""
    for operator in case.trace.operators.values():
        if name in operator.parameters and operator.name in ("addmm", "matmul"):
            return 1
    return 0


def inner_length(case: Case, name: str) -> int:
    """Number of terms in the sums of a product with this weight; 1 for a bias."""
    parameter = parameters(case)[name]
    return parameter.shape[1 - output_axis(case, name)] if parameter.dim() == 2 else 1
