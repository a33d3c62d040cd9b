"""A weight whose heads or channels stand in another order, or that is transposed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from divergence.diagnosis import orders, parts, rotary, weights
from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Fault
from divergence.diagnosis.hypotheses import Trial
from divergence.diagnosis.trace import Call, Handler
from divergence.sites import KEYS_AND_VALUES

ID = "weight_permuted"

_FIX = (
    "map the rows of '{name}' as the reference lays them out: check how the converter splits and joins heads"
)
_ORDERS = (  # of query, key and value; with key and value exchanged alone they are `kv_swapped`
    ("key", "query", "value"),
    ("value", "query", "key"),
    ("key", "value", "query"),
    ("value", "key", "query"),
)


def trials(case: Case) -> Iterator[Trial]:
    """The order that the site itself shows; then usual mistakes in every weight."""
    yield from _shown(case)
    yield from _grouped(case)
    yield from _within_heads(case)
    yield from _fused(case)
    for part in weights.matrices(case):
        weight = part.of(weights.parameters(case)[part.name])
        if weight.shape[0] == weight.shape[1]:
            yield _trial(part, "transposed", "is transposed", lambda w: w.T)
    yield from _heads(case)
    for part in weights.matrices(case):
        yield from _usual(case, part)
    yield from _kept(case)


def _shown(case: Case) -> Iterator[Trial]:
    """Orders of heads, and of channels, that match the candidate's tensor to the reference's."""
    if not any(case.tensor in pair for pair in KEYS_AND_VALUES):
        return
    part = weights.projection(case, case.tensor)
    if part is None:
        return
    clean, seen = (case.valid(case.tensor, t) for t in (case.clean[case.tensor], case.candidate[case.tensor]))
    heads, size = clean.shape[1], clean.shape[3]
    if heads > 1:
        order = matched(*(t.transpose(0, 1).reshape(heads, -1) for t in (clean, seen)))
        if order is not None:
            yield _ordered(case, part, "heads", order, size)
    flat = [t.transpose(1, 3).reshape(t.shape[0], size, -1, heads) for t in (clean, seen)]
    rows = [t.permute(3, 1, 0, 2).reshape(heads * size, -1) for t in flat]
    order = matched(rows[0], rows[1])
    if order is not None:
        yield _ordered(case, part, "channels", order, 1)


def _kept(case: Case) -> Iterator[Trial]:
    """Weights that the candidate itself keeps with rows or columns in another order."""
    found: dict[str, tuple[str, list[int]]] = {}
    for name, own in weights.held(case, weights.touched(case)).items():
        reference = weights.parameters(case)[name].detach().to(own.dtype)
        for axis in range(min(own.dim(), 2)):
            order = _exact_order(reference.movedim(axis, 0), own.movedim(axis, 0))
            if order is not None:
                outputs = own.dim() == 1 or axis == weights.output_axis(case, name)
                found[name] = "outputs" if outputs else "inputs", order
                break
    for names in weights.each_and_all(list(found)):
        sides = dict.fromkeys(found[name][0] for name in names)
        words = " and ".join(f"'{name}'" for name in names)
        yield Trial(
            key=f"own {' '.join(names)}",
            title=f"the {' and '.join(sides)} of {words} stand in another order{_spelt(found[names[0]][1])}",
            fault=weights.in_place(weights.held(case, names)),
            parameters={"parameters": names, "unit": " and ".join(sides), "order": found[names[0]][1]},
            fix=_FIX.format(name=names[0]),
        )


def _exact_order(reference: Tensor, own: Tensor) -> list[int] | None:
    """For every row of `own` the row of `reference` that it is to the bit, or None where they are no other
    order of the same rows, each of which is there once."""
    places = {row.cpu().numpy().tobytes(): i for i, row in enumerate(_bits(reference))}
    order = [places.get(row.cpu().numpy().tobytes()) for row in _bits(own)]
    known = [place for place in order if place is not None]
    return known if sorted(known) == list(range(len(own))) and known != sorted(known) else None


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(len(tensor), -1).view(torch.uint8)


def matched(clean: Tensor, seen: Tensor) -> list[int] | None:
    """For every row of `seen` the row of `clean` that it is, or None where they are no permutation (or
    in order). Rows `[row, element]` are matched by cosine."""
    a, b = (torch.nn.functional.normalize(t, dim=1) for t in (clean, seen))
    order = (b @ a.T).argmax(1).tolist()
    return order if sorted(order) == list(range(len(order))) and order != sorted(order) else None


def _ordered(case: Case, part: weights.Part, unit: str, order: list[int], size: int) -> Trial:
    return Trial(
        key=f"{part} {unit}",
        title=f"the {unit} of '{part}' stand in another order{_spelt(order)}",
        fault=weights.outputs_in_order(case, part, orders.rows_of(order, size)),
        parameters={"parameter": str(part), "unit": unit, "order": order},
        fix=_FIX.format(name=part.name),
    )


def _grouped(case: Case) -> Iterator[Trial]:
    """Groups of queries that read the keys and values of other groups."""
    key = case.clean.get("key")
    attentions = parts.attentions(case.trace)
    if key is None or key.dim() != 4 or key.shape[1] == 1 or not attentions:
        return
    shown = _tiles_shown(case, case.trace.operators[attentions[0].scores].shape[1])
    if case.tensor != "hidden" and case.tensor not in shown:
        return
    handlers: dict[int, Handler] = {}
    for attention in attentions:
        handlers |= dict.fromkeys((attention.scores, attention.context), partial(_tiled, key.shape[1]))
    yield Trial(
        key="groups",
        title="queries read the keys and values of other groups: heads are tiled (0, 1, .., 0, 1, ..) where "
        "each has to be repeated (0, 0, .., 1, 1, ..)",
        fault=Fault(
            operators=lambda: handlers,
            outputs=lambda seen: {n: t[:, shown[n]] if n in shown else t for n, t in seen.items()},
        ),
        parameters={"heads": key.shape[1], "change": "tiled"},
        fix="repeat every head of keys and values for its own group of queries (repeat_interleave, Expand "
        "before Reshape), not all heads one after another (repeat, Tile)",
    )


def _tiles_shown(case: Case, queries: int) -> dict[str, list[int]]:
    """Where the candidate shows a head of key and value for every query, one of each group's is compared: for
    each of these the head of the reference that it is if they are tiled."""
    found: dict[str, list[int]] = {}
    for name in ("key", "value"):
        if name not in case.failing or name not in case.error:
            continue
        clean, seen = case.valid_clean(name), case.valid(name, case.candidate[name])
        heads = clean.shape[1]
        repeats = queries // heads
        options = [[(first + repeats * i) % heads for i in range(heads)] for first in range(repeats)]
        left = {i: float((seen - clean[:, order]).norm()) for i, order in enumerate(options)}
        best = min(left, key=lambda i: left[i], default=None)
        if best is not None and left[best] < 0.5 * float(case.error[name].norm()):
            found[name] = options[best]
    return found


def _tiled(heads: int, call: Call) -> object:
    """An attention product whose operands, each of so many heads repeated, have them tiled."""
    left, query = parts.query_of(call)
    given = call.argument(left, query)
    for position, name in ((1, "key"), (2, "value")) if query == "query" else ((left + 1, "other"),):
        operand = call.argument(position, name)
        if given is None or operand is None or operand.dim() != 4:
            return call.run()
        queries = given.shape[1]
        if queries == heads or queries % heads:
            return call.run()
        step = operand.shape[1] // heads
        order = [(i % heads) * step for i in range(queries)]
        call = call.replaced(position, name, operand[:, order])
    return call.run()


def _within_heads(case: Case) -> Iterator[Trial]:
    """Channels within every head laid out for the other kind of rotary embedding: of query and key, of the
    key alone, of the query alone."""
    size = _head_size(case)
    key = weights.projection(case, "key") if size else None
    if key is None or case.tensor not in ("key", "hidden"):
        return
    query = next((where.query for where in orders.joined(case)), None)
    groups: list[list[weights.Part | None]] = [[key, query], [key]] if case.tensor == "key" else [[query]]
    turned = rotary.find(case)
    widths = {size, size if turned is None else 2 * turned.unique.numel()}
    for group in ([part for part in each if part is not None] for each in groups):
        for width in sorted(w for w in widths if 2 < w <= size and w % 2 == 0):
            for words, order in _layouts(width):
                if group:
                    yield _laid_out(case, group, words, [*order, *range(width, size)])


def _fused(case: Case) -> Iterator[Trial]:
    """A fused projection whose query, key and value lie in another order, or that is laid out by head where
    it should be by query, key and value, or the other way round."""
    key = weights.projection(case, "key")
    if key is None or not key.role or case.tensor not in ("key", "value"):
        return
    yield from _ordered_parts(case, key)
    _, heads, _, size = case.clean["value"].shape
    total = weights.parameters(case)[key.name].shape[key.axis]
    if total != 3 * heads * size or heads == 1:
        return
    for words, shape in (("by head", (3, heads, size)), ("by query, key and value", (heads, 3, size))):
        yield _whole(
            case,
            key,
            torch.arange(total).view(shape).transpose(0, 1).flatten(),
            f"laid out {words}",
            f"are laid out {words}, unlike the reference's",
            "for each head, or whole",
        )


def _ordered_parts(case: Case, key: weights.Part) -> Iterator[Trial]:
    """Query, key and value, of every head where they lie side by side, in every other order that the site
    can show."""
    rows = torch.arange(weights.parameters(case)[key.name].shape[key.axis]).view(key.groups, -1)
    assert key.stop is not None
    stops = {"query": (0, key.start), "key": (key.start, key.stop), "value": (key.stop, rows.shape[1])}
    first, last = stops[case.tensor]
    for order in _ORDERS:
        parts_of = [rows[:, slice(*stops[role])] for role in order]
        moved = torch.cat(parts_of, 1)
        if torch.equal(moved[:, first:last], rows[:, first:last]):
            continue
        words = ", ".join(order)
        yield _whole(
            case,
            key,
            moved.flatten(),
            f"in the order {words}",
            f"lie in the order {words}, and the reference's in the order query, key, value",
            "in the same order",
            {"order": list(order)},
        )


def _whole(
    case: Case,
    key: weights.Part,
    order: Tensor,
    change: str,
    words: str,
    how: str,
    parameters: Mapping[str, object] | None = None,
) -> Trial:
    """All rows of a fused projection, and of its bias, in another order."""
    whole = weights.Part(key.name)
    return Trial(
        key=f"{whole} {change}",
        title=f"the rows of '{whole}' {words}",
        fault=weights.outputs_in_order(case, whole, order),
        parameters={"parameter": str(whole), "change": change, **(parameters or {})},
        fix=f"split '{whole}' into query, key and value as the reference does: {how}",
    )


def _laid_out(case: Case, group: list[weights.Part], words: str, order: list[int]) -> Trial:
    def change(part: weights.Part, weight: Tensor) -> Tensor:
        axis = weights.output_axis(case, part.name) if weight.dim() > 1 else 0
        rows = torch.arange(weight.shape[axis], device=weight.device).unflatten(0, (-1, len(order)))
        return weight.index_select(axis, rows[:, order].flatten())

    changed = [one for part in group for one in (part, weights.bias_of(case, part)) if one is not None]
    fault = weights.one_after_another((one.name, one.change(partial(change, one))) for one in changed)
    names = " and ".join(f"'{part}'" for part in group)
    return Trial(
        key=f"{names} within heads {words} {len(order)}",
        title=f"the channels of every head of {names} have {words}",
        fault=fault,
        parameters={"parameters": [str(part) for part in group], "change": words, "order": order},
        fix="convert the rows of query and key to the layout of the rotary embedding that is used, once: "
        "halves (i, i + d/2) or pairs (2i, 2i + 1)",
    )


def _layouts(length: int) -> list[tuple[str, list[int]]]:
    """Orders that turn one pairing of channels into the other."""
    return [
        ("halves interleaved", [i // 2 + (i % 2) * (length // 2) for i in range(length)]),
        ("pairs taken apart", [*range(0, length, 2), *range(1, length, 2)]),
    ]


def _heads(case: Case) -> Iterator[Trial]:
    """Heads in another order where the site cannot show it: those of the queries, and those that a weight
    joins; heads joined channel by channel."""
    if case.tensor != "hidden":
        return
    for where in orders.joined(case):
        order = orders.of_inputs(case, where)
        if order is not None:
            yield Trial(
                key=f"{where.output} input heads",
                title=f"'{where.output}' has its input heads in another order{_spelt(order)}",
                fault=orders.inputs_fault(case, where, order),
                parameters={"parameter": str(where.output), "unit": "input heads", "order": order},
                fix=_FIX.format(name=where.output.name),
            )
        order = None if where.query is None else orders.of_queries(case, where)
        if where.query is not None and order is not None:
            yield _ordered(case, where.query, "heads", order, _rows(case, where.query) // len(order))
        yield _joined(case, where)


def _joined(case: Case, where: orders.Joined) -> Trial:
    """Heads joined channel by channel: the first of every head, then the second of every head."""
    columns = torch.arange(where.heads * where.size).view(where.size, where.heads).T.flatten()
    return Trial(
        key=f"{where.output} joined by channel",
        title=f"heads are joined channel by channel before '{where.output}', the first of every head, then "
        "the second",
        fault=weights.inputs_in_order(case, where.output, columns),
        parameters={"parameter": str(where.output), "change": "joined by channel"},
        fix="join the heads whole, one after another: move the axis of heads before that of channels",
    )


def _usual(case: Case, part: weights.Part) -> Iterator[Trial]:
    """Outputs by halves and pairs, and turned round."""
    length = _rows(case, part)
    usual = [("halves exchanged", [*range(length // 2, length), *range(length // 2)]), *_layouts(length)]
    for words, order in (*(usual if length % 2 == 0 else ()), ("in reverse", [*range(length)][::-1])):
        change = _reordered(weights.output_axis(case, part.name), order)
        yield _trial(part, f"output {words}", f"has its output {words}", change)


def _rows(case: Case, part: weights.Part) -> int:
    """Number of outputs of a weight."""
    return part.of(weights.parameters(case)[part.name]).shape[weights.output_axis(case, part.name)]


def _spelt(order: list[int]) -> str:
    return f": {order}" if len(order) <= 16 else ""


def _head_size(case: Case) -> int:
    """The length of a head, 0 where unknown."""
    key = case.clean.get("key")
    return 0 if key is None or key.dim() != 4 else key.shape[3]


def _reordered(axis: int, order: list[int]) -> Callable[[Tensor], Tensor]:
    return lambda w: w.index_select(axis, torch.tensor(order, device=w.device))


def _trial(part: weights.Part, key: str, words: str, change: Callable[[Tensor], Tensor]) -> Trial:
    return Trial(
        key=f"{part} {key}",
        title=f"'{part}' {words}",
        fault=weights.fault([part], change),
        parameters={"parameter": str(part), "change": key},
        fix=_FIX.format(name=part.name),
    )
