"""Finds the order of attention's heads where only what comes after them shows it.

Where the heads are joined each adds its own product to the hidden state. So does a head that stands
in the place of another: what each would add in each place is computed from attention alone, and the
error at the site is put together from these by least squares. What the rest of the layer makes of it
is taken for noise at first; an emulation of the order found says how much of it there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from divergence.diagnosis import parts, weights
from divergence.diagnosis.case import ENOUGH, Case, share
from divergence.diagnosis.emulate import Fault
from divergence.diagnosis.trace import Call

_MOST_HEADS = 32
_LEAST_SHARE = 0.2  # of what a head adds; below it is noise
_EQUATIONS = 4096  # for the least squares, and at least so many
_PER_UNKNOWN = 8
_TOKENS = 16
_ROUNDS = 6
_FOUND = 0.99


@dataclass(frozen=True)
class Joined:
    """Where the heads of an attention are joined.

    Attributes:
        product: number of the operator that multiplies with the weight.
        output: the weight that joins them.
        query: the weight that the queries are projected with, None where there is none of its own.
        heads, size: number of heads and their length.
    """

    product: int
    output: weights.Part
    query: weights.Part | None
    heads: int
    size: int


def joined(case: Case) -> Iterator[Joined]:
    """For every attention of the layer where its heads are joined."""
    trace = case.trace
    for attention in parts.attentions(trace):
        after = [o for o in trace.named("linear", "addmm", "matmul") if o.index > attention.context]
        product = next((o for o in after if attention.context in trace.ancestors(o.index)), None)
        if product is None:
            continue
        output = next(iter(_weights_above(case, product.index)), None)
        if output is None:
            continue
        heads, left = divmod(weights.inner_length(case, output), attention.channels)
        if left or not 1 < heads <= _MOST_HEADS:
            continue
        query = _query(case, attention, heads)
        yield Joined(product.index, weights.Part(output), query, heads, attention.channels)


def _query(case: Case, attention: parts.Attention, heads: int) -> weights.Part | None:
    """The weight of the queries, or the part of a fused one that makes them."""
    scores = case.trace.operators[attention.scores]
    made = [i for i, depends in zip(scores.inputs, scores.dependent, strict=True) if depends]
    name = next(iter(_weights_above(case, made[0])), None) if made and made[0] is not None else None
    if name is None:
        return None
    key = weights.projection(case, "key")
    query = weights.Part(name)
    if key is not None and key.name == name and key.role:
        query = replace(key, role="query", start=0, stop=key.start)
    rows = query.of(weights.parameters(case)[name]).shape[weights.output_axis(case, name)]
    sizes = {attention.channels, case.clean["key"].shape[-1] if "key" in case.clean else 0}
    return query if rows in {heads * size for size in sizes} else None


def _weights_above(case: Case, index: int) -> list[str]:
    """Names of the matrices that an operator depends on, nearest first."""
    named = weights.parameters(case)
    above = sorted(case.trace.ancestors(index), reverse=True)
    names = [name for i in above for name in case.trace.operators[i].parameters]
    return [name for name in names if named[name].dim() == 2]


def of_inputs(case: Case, where: Joined) -> list[int] | None:
    """The order of heads in which the weight that joins them takes them, or None."""
    clean = _inputs(case, where, Fault())
    if clean is None:
        return None
    held = [clean.roll(-shift, 1) for shift in range(where.heads)]
    order = _solved(case, where, held, lambda order: inputs_fault(case, where, _inverse(order)))
    return None if order is None else _inverse(order)


def of_queries(case: Case, where: Joined) -> list[int] | None:
    """The order of heads of the queries, or None."""
    assert where.query is not None
    held = []
    for shift in range(where.heads):
        order = [(i + shift) % where.heads for i in range(where.heads)]
        inputs = _inputs(case, where, queries_fault(case, where.query, order))
        if inputs is None:
            return None
        held.append(inputs)
    return _solved(case, where, held, lambda order: queries_fault(case, where.query, order))


def queries_fault(case: Case, query: weights.Part | None, order: Sequence[int]) -> Fault:
    """The heads of a projection, with its bias, in another order."""
    assert query is not None
    axis = weights.output_axis(case, query.name)
    size = query.of(weights.parameters(case)[query.name]).shape[axis] // len(order)
    return weights.outputs_in_order(case, query, rows_of(order, size))


def inputs_fault(case: Case, where: Joined, order: Sequence[int]) -> Fault:
    """The heads that a weight joins in another order."""
    return weights.inputs_in_order(case, where.output, rows_of(order, where.size))


def rows_of(order: Sequence[int], size: int) -> Tensor:
    """Numbers of the rows of heads of that `size` in that order."""
    return torch.tensor([o * size + i for o in order for i in range(size)])


def _inverse(order: Sequence[int]) -> list[int]:
    return [list(order).index(i) for i in range(len(order))]


def _inputs(case: Case, where: Joined, fault: Fault) -> Tensor | None:
    """What the weight that joins the heads is multiplied with, `[token, head, channel]`; of the layer
    nothing but attention is computed for it."""
    kept: list[Tensor] = []

    def keep(call: Call) -> object:
        at = 1 if getattr(call.func, "__name__", "") in ("addmm", "einsum") else 0
        kept.append(call.argument(at, "input"))
        return call.run()

    needed = case.trace.ancestors(where.product)
    reuse = {i: t for i, t in case.trace.results.items() if i not in needed}
    reuse |= {i: t for i, t in case.trace.unchanged(fault, products=True).items() if i != where.product}
    keeping = Fault(operators=lambda: {where.product: keep})
    with torch.inference_mode():
        case.unit.run((*case.applied, fault, keeping), reuse=reuse)
    if not kept or kept[0].shape[-1] != where.heads * where.size:
        return None
    return kept[0].reshape(-1, where.heads, where.size)


def _solved(
    case: Case, where: Joined, held: Sequence[Tensor], fault: Callable[[list[int]], Fault]
) -> list[int] | None:
    """For every place the head that is there, given what places hold when all are shifted by so many."""
    error = case.error[case.tensor]
    shown = case.valid(case.tensor, torch.ones_like(case.clean[case.tensor]))  # what an error counts as
    flat = [t.reshape(-1, t.shape[-1]) for t in (error, shown)]
    if flat[0].shape[0] != held[0].shape[0]:
        return None
    tokens = _tokens(flat[1], where.heads)
    added = _Added(case, where, [t[tokens] for t in held], flat[1][tokens])
    added.scale(_gains(case, where, held[0][tokens], flat[1][tokens], tokens))
    target = flat[0][tokens]
    found: list[int] | None = None
    best, tried = 0.0, []
    for _ in range(_ROUNDS):
        order = _order(added.shares(target))
        if order is None or order in tried:
            break
        tried.append(order)
        emulated = case.emulated(fault(order))
        explained = share(error, emulated)
        if explained > best:
            found, best = order, explained
        if best > _FOUND or best == 0.0:
            break
        made, rest = (t.reshape(flat[0].shape)[tokens] for t in (emulated, error - emulated))
        added.scale(added.gains(order, made))
        target = rest + added.of(order)
    return found if best > ENOUGH else None


def _gains(case: Case, where: Joined, held: Tensor, shown: Tensor, tokens: Tensor) -> Tensor:
    """What becomes of each channel that the heads add to behind them, a norm among it: seen when all heads
    are taken for their neighbours."""
    known = f"gains {where.product}"
    if known not in case.memory:
        order = [*range(1, where.heads), 0]
        emulated = case.emulated(inputs_fault(case, where, _inverse(order)))
        made = emulated.reshape(-1, emulated.shape[-1])[tokens]
        case.memory[known] = _Added(case, where, [held, held.roll(-1, 1)], shown).gains(order, made)
    found: Tensor = case.memory[known]
    return found


def _tokens(shown: Tensor, heads: int) -> Tensor:
    """Tokens for as many equations as are needed, evenly spread."""
    valid = shown.any(1).nonzero().flatten()
    equations = max(_EQUATIONS, _PER_UNKNOWN * heads * heads)
    count = max(_TOKENS, -(-equations // shown.shape[1]))
    step = max(1, valid.numel() // count)
    return valid.flip(0)[::step]


class _Added:
    """What a head adds to the error in the place of another.

    Args:
        case: the layer.
        where: heads are joined.
        held: for every shift what the places hold, `[token, head, channel]`.
        shown: what an error of one counts as, `[token, channel]`.
    """

    def __init__(self, case: Case, where: Joined, held: Sequence[Tensor], shown: Tensor) -> None:
        weight = where.output.of(weights.parameters(case)[where.output.name]).detach()
        weight = weight.T if weights.output_axis(case, where.output.name) else weight
        self._weight = weight.to(torch.float64).unflatten(1, (where.heads, where.size))
        self._moved = [(t - held[0]).to(torch.float64) for t in held[1:]]
        self._shown = shown

    def _token(self, token: int) -> Tensor:
        """`[shift - 1, head, channel]` of one token."""
        moved = torch.stack([t[token] for t in self._moved])
        return torch.einsum("shc,ohc->sho", moved, self._weight) * self._shown[token]

    def of(self, order: Sequence[int]) -> Tensor:
        """What an order adds, `[token, channel]`."""
        heads = len(order)
        shifts = [(o - i) % heads for i, o in enumerate(order)]
        each = [self._token(token) for token in range(self._shown.shape[0])]
        return torch.stack([sum((t[s - 1, i] for i, s in enumerate(shifts) if s), t[0, 0] * 0) for t in each])

    def gains(self, order: Sequence[int], made: Tensor) -> Tensor:
        """By how much of what an order adds an emulation of it has `made`, `[channel]`."""
        alone = self.of(order)
        return (alone * made).sum(0) / alone.square().sum(0).clamp(min=1e-30)

    def scale(self, gains: Tensor) -> None:
        """Scales what is added, by channel."""
        self._shown = self._shown * gains

    def shares(self, target: Tensor) -> Tensor:
        """How much of every head is in every place, `[place, head]`; a head's own place is 0."""
        heads = self._weight.shape[1]
        unknowns = (heads - 1) * heads
        products = torch.zeros(unknowns, unknowns, dtype=torch.float64, device=target.device)
        along = torch.zeros(unknowns, dtype=torch.float64, device=target.device)
        for token in range(target.shape[0]):
            each = self._token(token).flatten(0, 1)
            products += each @ each.T
            along += each @ target[token]
        ridge = 1e-6 * products.diagonal().mean().clamp(min=1e-30)
        solved = torch.linalg.solve(products + ridge * torch.eye(unknowns).to(products), along)
        found = torch.zeros(heads, heads, dtype=torch.float64)
        for shift, row in enumerate(solved.view(heads - 1, heads).tolist(), 1):
            for place, value in enumerate(row):
                found[place, (place + shift) % heads] = value
        return found


def _order(shares: Tensor) -> list[int] | None:
    """The order that shares of heads in places amount to, None where they are noise."""
    heads = shares.shape[0]
    most = float(shares.max())
    if most < _LEAST_SHARE:
        return None
    # A head that stays has no share: it is as likely as one that moves with half of the largest.
    wanted = shares + 0.5 * most * torch.eye(heads, dtype=shares.dtype)
    order = [-1] * heads
    for flat in wanted.flatten().argsort(descending=True).tolist():
        place, head = divmod(flat, heads)
        if order[place] < 0 and head not in order:
            order[place] = head
    return order if order != sorted(order) else None
