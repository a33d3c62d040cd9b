"""Recognises norms, attention and activations in a trace."""

from __future__ import annotations

from dataclasses import dataclass

from divergence.diagnosis.case import Case
from divergence.diagnosis.trace import ACTIVATING, STRUCTURAL, Call, Operator, Trace

_FUSED_NORMS = ("layer_norm", "rms_norm", "native_layer_norm")
_ROOTS = ("rsqrt", "sqrt", "pow")
_ELEMENTWISE = STRUCTURAL | {
    "mul",
    "div",
    "add",
    "sub",
    "where",
    "softmax",
    "tanh",
    "clamp",
    "maximum",
    "max",
}


@dataclass(frozen=True)
class Norm:
    """A normalisation.

    Attributes:
        root: number of the fused operator, or of the root over the statistics.
        epsilon_at: number of the operator that adds the epsilon; the fused operator itself where there is
            one.
        epsilon: as the reference has it.
        fused: whether one operator does it all.
        number: counts the norms of the layer from 0.
    """

    root: int
    epsilon_at: int
    epsilon: float
    fused: bool
    number: int


@dataclass(frozen=True)
class Attention:
    """An attention product.

    Attributes:
        fused: number of `scaled_dot_product_attention`, or None.
        scores, softmax, context: numbers of query times key, of the softmax, of probabilities times value.
        masks: numbers of the operators between scores and softmax that bring in a mask, or of the scores
            themselves where the mask is what their product is added to (`baddbmm`).
        channels: length of a query.
    """

    fused: int | None
    scores: int
    softmax: int
    context: int
    masks: tuple[int, ...]
    channels: int


def norms(trace: Trace) -> list[Norm]:
    """The normalisations of the hidden input and of what is computed from it."""
    found: list[Norm] = []
    for operator in trace.named(*_FUSED_NORMS, *_ROOTS):
        if operator.name in _FUSED_NORMS:
            epsilon = next((s for s in reversed(operator.scalars) if 0 <= s < 0.1), 1e-5)
            found.append(Norm(operator.index, operator.index, epsilon, fused=True, number=len(found)))
            continue
        if operator.name == "pow" and operator.scalars[-1:] not in ((-0.5,), (0.5,)):
            continue
        adds = [
            o for o in trace.upstream(operator.index) if o.name in ("add", "clamp", "clamp_min", "maximum")
        ][:1]
        if adds and adds[0].scalars and 0 < adds[0].scalars[0] < 0.1:
            found.append(
                Norm(operator.index, adds[0].index, adds[0].scalars[0], fused=False, number=len(found))
            )
    return found


def attentions(trace: Trace) -> list[Attention]:
    """The attention products, fused or written out."""
    found = [
        Attention(o.index, o.index, o.index, o.index, (o.index,), o.shape[-1])
        for o in trace.named("scaled_dot_product_attention")
    ]
    for softmax in trace.named("softmax"):
        above = list(trace.upstream(softmax.index, _ELEMENTWISE))
        scores = next((o for o in above if o.name == "matmul" and len(o.shape) >= 3), None)
        context = next(
            (
                o
                for o in trace.named("matmul")
                if o.index > softmax.index
                and any(u.index == softmax.index for u in trace.upstream(o.index, _ELEMENTWISE))
            ),
            None,
        )
        if scores is None or context is None:
            continue
        masks = tuple(
            o.index
            for o in reversed(above)
            if o.index > scores.index and o.depends and len(o.shape) >= 3 and brings_mask(o)
        )
        if not masks and _added_to(scores):
            masks = (scores.index,)
        found.append(Attention(None, scores.index, softmax.index, context.index, masks, context.shape[-1]))
    return found


def brings_mask(operator: Operator) -> bool:
    """Whether an operator between scores and softmax joins a tensor that is no activation."""
    if operator.name == "where":
        return True
    return (
        operator.name in ("add", "sub", "mul")
        and len(operator.dependent) == 2
        and not all(operator.dependent)
    )


def _added_to(scores: Operator) -> bool:
    """Whether a product of query and key is added to a tensor that is no activation."""
    return len(scores.dependent) == 3 and not scores.dependent[0] and any(scores.dependent[1:])


def activations(trace: Trace) -> list[Operator]:
    """The activation functions."""
    return trace.named(*ACTIVATING)


@dataclass(frozen=True)
class Activated:
    """Where an activation is computed.

    Attributes:
        first, last: numbers of its first and last operator; the same where one does it all.
        argument: position of the input among the first operator's arguments.
        name: which it is.
        number: counts the activations of the layer from 0.
    """

    first: int
    last: int
    argument: int
    name: str
    number: int


def activated(case: Case) -> list[Activated]:
    """The activations that the site depends on."""
    found: list[Activated] = []
    # A tanh between scores and softmax caps the scores (Gemma 2).
    scores = {i for a in attentions(case.trace) for i in case.trace.ancestors(a.softmax) if a.fused is None}
    for operator in activations(case.trace):
        if operator.index in scores and operator.name in ("tanh", "sigmoid"):
            continue
        if operator.name in ("tanh", "sigmoid") and _written_out(case.trace, operator) is not None:
            first, last, name = _written_out(case.trace, operator) or (0, 0, "")
        else:
            first, last, name = _squared(case.trace, operator)
        if case.trace.reaches(case.tensor, last):
            found.append(Activated(first, last, 0, name, len(found)))
    return found


def _squared(trace: Trace, operator: Operator) -> tuple[int, int, str]:
    """An activation, with the square of it where that is what is used (relu in Nemotron)."""
    index, name = operator.index, operator.name
    for user in trace.operators.values():
        if index not in user.inputs or set(user.inputs) != {index}:
            continue
        power = user.name == "pow" and user.scalars[-1:] == (2.0,)
        if power or user.name == "square" or (user.name == "mul" and len(user.inputs) == 2):
            return index, user.index, f"squared {name}"
    return index, index, name


def _written_out(trace: Trace, inner: Operator) -> tuple[int, int, str] | None:
    """The operators of an activation that multiplies its input by a function of it: those of
    gelu by tanh, of silu and quick gelu by sigmoid."""
    simple = frozenset({"mul", "add", "pow", "square"})
    inside = {inner.index}
    source: int | None = None
    for operator in trace.upstream(inner.index, simple):
        if operator.name in simple and not operator.parameters:
            inside.add(operator.index)
        elif source is None:
            source = operator.index
    for operator in trace.operators.values():
        if operator.index <= inner.index or operator.name not in simple:
            continue
        inputs = [i for i in operator.inputs if i is not None]
        if not inside & set(inputs):
            continue
        inside.add(operator.index)
        if operator.name == "mul" and _meets(trace, operator, inner.index, source):
            first = min(i for i in inside if source in trace.operators[i].inputs)
            return first, operator.index, "gelu (tanh)" if inner.name == "tanh" else "silu"
    return None


def _meets(trace: Trace, product: Operator, inner: int, source: int | None) -> bool:
    """Whether a product joins the branch through `inner` with the input itself."""
    if len(product.inputs) != 2:
        return False
    above = [trace.ancestors(i) if i is not None else set() for i in product.inputs]
    through = [inner in a for a in above]
    return through.count(True) == 1 and source in above[through.index(False)]


def query_of(call: Call) -> tuple[int, str]:
    """Position and name of the left operand among the arguments of a product."""
    name = getattr(call.func, "__name__", "")
    if name == "baddbmm":
        return 1, "batch1"
    return (1, "") if name == "einsum" else (0, "query" if "attention" in name else "input")
