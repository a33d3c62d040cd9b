"""Attention scores with another scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from divergence.diagnosis import parts
from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Fault
from divergence.diagnosis.hypotheses import Trial
from divergence.diagnosis.trace import Call, Handler

ID = "attention_scale"


def trials(case: Case) -> Iterator[Trial]:
    """Query times key, times a factor that is estimated."""
    for number, attention in enumerate(parts.attentions(case.trace)):
        if not case.trace.reaches(case.tensor, attention.context):
            continue
        root = float(attention.channels) ** 0.5
        yield Trial(
            key=f"attention {number}",
            title="the attention scores are {value:.4g} times the reference's",
            fault=_fault(attention),
            starts=(1.0, root, 1 / root, 2.0, 0.5, 0.0),
            accept=lambda factor: abs(factor - 1) > 1e-5,
            parameters=partial(_reported, root),
            fix="scale query times key by the reference's factor, once: check `scale` of the attention "
            "operator against "
            "1 / sqrt(head_dim), and that the query is not scaled before it too",
        )


def _reported(root: float, factor: float) -> dict[str, object]:
    for value, words in (
        (root, "no division by sqrt(head_dim)"),
        (1 / root, "divided by sqrt(head_dim) twice"),
    ):
        if abs(factor / value - 1) < 0.01:
            return {"factor": factor, "meaning": words}
    return {"factor": factor}


def _fault(attention: parts.Attention) -> Callable[[float], Fault]:
    def scaled(factor: float) -> Fault:
        def handler(call: Call) -> object:
            position, name = parts.query_of(call)
            query = call.argument(position, name)
            return call.replaced(position, name, query * factor).run()

        handlers: dict[int, Handler] = {attention.scores: handler}
        return Fault(operators=lambda: handlers)

    return scaled
