"""Finds the rotary embedding in a layer, wherever its cosines and sines come from, and changes it.

Products with a tensor that does not depend on the hidden input are the mark: two such tensors whose
squares add up to a constant are cosine and sine, and a complex one of constant modulus is both.
Positions and inverse frequencies are read back from them, so that an embedding outside the layers, a
table in a buffer and one computed in the layer are the same here. RoPE: Su et al. 2021, arXiv:2104.09864.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from divergence.diagnosis.angles import known_frequencies, off, read_back, read_one
from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Fault, LayerUnit
from divergence.diagnosis.trace import Call, Handler, Operator, Trace

Part = Literal["cosines", "sines", "both"]


@dataclass(frozen=True)
class Table:
    """Cosines or sines in canonical form.

    Attributes:
        shape: of the operand, as it enters products.
        axis: of its tokens.
    """

    shape: torch.Size
    axis: int

    def canonical(self, tensor: Tensor) -> Tensor:
        """`[rows, token, frequency]` of an operand."""
        return tensor.movedim(self.axis, -2).reshape(-1, self.shape[self.axis], self.shape[-1])

    def operand(self, canonical: Tensor) -> Tensor:
        """The operand of a canonical table; one row more than the operand's own become its first axis."""
        shape = list(torch.empty(self.shape, device="meta").movedim(self.axis, -2).shape)
        rows = canonical.shape[0]
        if rows != max(1, _product(shape[:-2])):
            shape = [rows, *[1] * max(0, len(shape) - 3), *shape[-2:]]
        return canonical.reshape(shape).movedim(-2, self.axis)


@dataclass(frozen=True)
class Turn:
    """Where one tensor is turned: numbers of the operators that hold it before and after.

    Attributes:
        before, after: the numbers.
        table: form of the cosines there.
    """

    before: int
    after: int
    table: Table


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of a layer.

    Attributes:
        uses: for each product, what it takes (`both` as complex numbers), its position among the arguments,
            its form.
        positions: `[rows, token]`, whole numbers.
        frequencies: inverse frequencies `[frequency]`, float32, as many as the tables have columns.
        amplitude: of cosine and sine, 1 unless the embedding scales attention.
        turns: the tensors that are turned.
    """

    uses: Mapping[int, tuple[Part, int, Table]]
    positions: Tensor
    frequencies: Tensor
    amplitude: float
    turns: tuple[Turn, ...]

    def angles(self, positions: Tensor, frequencies: Tensor) -> Tensor:
        """Angles in radians `[rows, token, frequency]`, float32 as models compute them."""
        return positions.float()[:, :, None] * frequencies.float()

    def with_angles(self, angles: Tensor, rounding: Callable[[Tensor], Tensor] = lambda t: t) -> Fault:
        """The fault of other angles `[rows, token, frequency]`; `rounding` is done to cosines and sines."""

        def make() -> dict[int, Handler]:
            cos, sin = (rounding(f(angles.float())) * self.amplitude for f in (torch.cos, torch.sin))
            made = {"cosines": cos, "sines": sin, "both": torch.complex(cos, sin)}
            return {
                index: _replacing(table.operand(made[part]), at)
                for index, (part, at, table) in self.uses.items()
            }

        return Fault(operators=make)

    def with_layout(self, layout: str, sign: float = 1.0) -> Fault:
        """The fault of turning other pairs of channels: `halves` (i, i + d/2) or `pairs` (2i, 2i + 1)."""

        def make() -> dict[int, Handler]:
            handlers: dict[int, Handler] = {}
            for turn in self.turns:
                kept: list[Tensor] = []
                handlers[turn.before] = _keeping(kept)
                handlers[turn.after] = self._turning(turn, kept, layout, sign)
            return handlers

        return Fault(operators=make)

    def _turning(self, turn: Turn, kept: list[Tensor], layout: str, sign: float) -> Handler:
        def handler(call: Call) -> object:
            made = call.run()
            x = kept[-1]
            count = x.shape[-1] // 2
            if self.unique.numel() != count:
                return made
            angles = sign * self.angles(self.positions, self.unique)
            shape = torch.Size((*turn.table.shape[:-1], count))
            table = Table(shape, turn.table.axis)
            cos, sin = (table.operand(f(angles) * self.amplitude).to(x.dtype) for f in (torch.cos, torch.sin))
            turned = turned_by(x, cos, sin, layout)
            return turned.reshape(made.shape) if turned.numel() == made.numel() else made

        return handler

    @property
    def unique(self) -> Tensor:
        """The frequencies, each once: tables hold them twice where they turn whole heads."""
        held = self.frequencies
        half = held.numel() // 2
        for once, other in ((held[:half], held[half:]), (held[::2], held[1::2])):
            if once.shape == other.shape and torch.allclose(once, other, rtol=1e-4):
                return once
        return held


def turned_by(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Channel pairs of `x` `[..., 2 n]` turned by angles of the given cosines and sines `[..., n]`."""
    if layout == "pairs":
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def find(case: Case) -> Rotary | None:
    """The rotary embedding of a case's layer, or None where it has none that is understood."""
    if "rotary" not in case.memory:
        case.memory["rotary"] = _find(case)
    found: Rotary | None = case.memory["rotary"]
    return found


def _find(case: Case) -> Rotary | None:
    if not isinstance(case.unit, LayerUnit):
        return None
    tokens = case.unit.hidden.shape[-2]
    tables = {i: t for i, t in case.trace.constants.items() if _table(t, tokens) is not None}
    parts = _complex(tables) or _paired({i: t for i, t in tables.items() if not t.is_complex()})
    first = next(iter(parts), None)
    form = _table(tables[first], tokens) if first is not None else None
    if first is None or form is None:
        return None
    unit = _unit(tables, parts, first, form)
    if unit is None:
        return None
    amplitude = float(unit.abs().square().mean().sqrt())
    unit = unit / amplitude
    buffers = dict(case.given.model.named_buffers()).values()

    def read_from(turned: Tensor) -> tuple[Tensor, Tensor] | None:
        return read_back(turned) if tokens > 1 else read_one(turned, buffers)

    read = read_from(unit)
    if parts[first] != "both":
        # Of one token, or at far positions, the larger ones need not be the cosines.
        exchanged = 1j * unit.conj()
        again = read_from(exchanged)
        if again is not None and (read is None or off(exchanged, *again) < off(unit, *read)):
            other: dict[Part, Part] = {"cosines": "sines", "sines": "cosines"}
            parts, read = {i: other[part] for i, part in parts.items()}, again
    if read is None:
        return None
    positions, frequencies = read
    uses: dict[int, tuple[Part, int, Table]] = {}
    for index, part in parts.items():
        table = _table(tables[index], tokens)
        assert table is not None
        uses[index] = (part, case.trace.operators[index].dependent.index(False), table)
    known = known_frequencies(buffers, frequencies)
    turning = _complex_turns if parts[first] == "both" else _turns
    turns = tuple(turning(case.trace, {i: table for i, (_, _, table) in uses.items()}))
    return Rotary(uses, positions, known.float(), amplitude, turns)


def _unit(tables: Mapping[int, Tensor], parts: Mapping[int, Part], first: int, form: Table) -> Tensor | None:
    """Cosines and sines as complex numbers `[rows, token, frequency]`."""
    if parts[first] == "both":
        return form.canonical(tables[first].to(torch.complex128))
    alike = (i for i, part in parts.items() if part == "sines" and tables[i].shape == tables[first].shape)
    sine = next(alike, None)
    if sine is None:
        return None
    return torch.complex(*(form.canonical(tables[i].double()) for i in (first, sine)))


def _table(tensor: Tensor, tokens: int) -> Table | None:
    """The form of a tensor that could hold cosines: one axis of tokens, at least two frequencies."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.dim() < 2 or tensor.shape[-1] < 2:
        return None
    axes = [i for i in range(tensor.dim() - 1) if tensor.shape[i] == tokens]
    return Table(tensor.shape, axes[-1]) if axes else None


def _complex(tables: Mapping[int, Tensor]) -> dict[int, Part]:
    """The products with complex numbers of constant modulus."""
    found: dict[int, Part] = {}
    for index, tensor in tables.items():
        if tensor.is_complex():
            modulus = tensor.to(torch.complex128).abs()
            mean = float(modulus.mean())
            if mean > 0.1 and float((modulus - mean).abs().max()) < 1e-2 * mean:
                found[index] = "both"
    return found


def _paired(tables: Mapping[int, Tensor]) -> dict[int, Part]:
    """Which products take cosines and which sines; none where no two add up."""
    distinct: dict[tuple[float, ...], list[int]] = {}
    for index, tensor in tables.items():
        wide = tensor.double()
        mark = (float(wide.sum()), float(wide.abs().sum()), float(wide.square().sum()), *tensor.shape[-1:])
        distinct.setdefault(mark, []).append(index)
    groups = list(distinct.values())
    for i, left in enumerate(groups):
        for right in groups[i + 1 :]:
            a, b = tables[left[0]].double(), tables[right[0]].double()
            if a.shape != b.shape:
                continue
            squares = a.square() + b.square()
            mean = float(squares.mean())
            if mean > 0.1 and float((squares - mean).abs().max()) < 1e-2 * mean:
                cosines, sines = (left, right) if float(a.mean()) > float(b.mean()) else (right, left)
                found: dict[int, Part] = dict.fromkeys(cosines, "cosines")
                return found | dict.fromkeys(sines, "sines")
    return {}


def _turns(trace: Trace, uses: Mapping[int, Table]) -> Iterator[Turn]:
    """The tensors that the products turn: from the last operator before them to the first after."""
    joined = [o for o in trace.named("add", "sub") if len(o.inputs) == 2 and all(i in uses for i in o.inputs)]
    done: set[int] = set()
    for position, operator in enumerate(joined):
        if operator.index in done:
            continue
        width = operator.shape[-1]
        table = uses[next(i for i in operator.inputs if i is not None)]
        parts = joined[position : position + 2]
        after = _meeting(trace, parts, 2 * width) if len(parts) == 2 else None
        before = _common(trace, parts, 2 * width) if after is not None else None
        if before is None or after is None:
            parts, after, before = [operator], operator, _common(trace, [operator], width)
        if before is None:
            continue
        done |= {p.index for p in parts}
        yield Turn(before, after.index, table)


def _complex_turns(trace: Trace, uses: Mapping[int, Table]) -> Iterator[Turn]:
    """Of products of complex numbers: their channels before and after are twice as many real ones."""
    moves = _MOVES | {"view_as_complex", "view_as_real", "contiguous"}
    for index, table in uses.items():
        width = (2 * table.shape[-1],)
        before = [o.index for o in trace.upstream(index, moves) if o.shape[-1:] == width]
        later = (o for o in trace.operators.values() if o.index > index and o.shape[-1:] == width)
        after = next(
            (o.index for o in later if any(u.index == index for u in trace.upstream(o.index, moves))), None
        )
        if before and after is not None:
            yield Turn(max(before), after, table)


def _common(trace: Trace, joined: list[Operator], width: int) -> int | None:
    """The last operator of that width that everything turned comes from by moving channels alone."""
    sets = []
    for operator in joined:
        for product in operator.inputs:
            assert product is not None
            inputs = trace.operators[product]
            source = next((i for i, d in zip(inputs.inputs, inputs.dependent, strict=True) if d), None)
            if source is None:
                return None
            near = (
                {source} | {o.index for o in trace.upstream(source)}
                if trace.operators[source].name in _MOVES
                else {source}
            )
            sets.append(near)
    shared = [i for i in set.intersection(*sets) if trace.operators[i].shape[-1:] == (width,)]
    return max(shared, default=None)


_MOVES = frozenset(
    {
        "getitem",
        "cat",
        "neg",
        "chunk",
        "split",
        "unbind",
        "stack",
        "select",
        "narrow",
        "reshape",
        "view",
        "flatten",
        "unflatten",
        "roll",
        "concat",
        "float",
        "to",
    }
)


def _meeting(trace: Trace, parts: list[Operator], width: int) -> Operator | None:
    """The first operator of that width after both parts that joins them."""
    both = {p.index for p in parts}
    for operator in trace.operators.values():
        if operator.index > max(both) and operator.shape[-1:] == (width,):
            near = {operator.index} | {o.index for o in trace.upstream(operator.index, _MOVES)}
            if both <= near:
                return operator
    return None


def _replacing(table: Tensor, at: int) -> Handler:
    def handler(call: Call) -> object:
        new = table.to(call.args[at].device, call.args[at].dtype)
        return call.func(*(new if i == at else a for i, a in enumerate(call.args)), **call.kwargs)

    return handler


def _keeping(kept: list[Tensor]) -> Handler:
    def handler(call: Call) -> object:
        made = call.run()
        kept.append(made)
        return made

    return handler


def _product(sizes: list[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
