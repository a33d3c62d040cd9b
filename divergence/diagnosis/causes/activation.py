"""Another activation function, or another approximation of the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from divergence.diagnosis import parts
from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Fault
from divergence.diagnosis.hypotheses import Trial
from divergence.diagnosis.trace import Call, Handler

ID = "activation"

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu (erf)": functional.gelu,
    "gelu (tanh)": lambda x: functional.gelu(x, approximate="tanh"),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": functional.silu,
    "relu": functional.relu,
    "squared relu": lambda x: functional.relu(x).square(),
    "no activation": lambda x: x,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}

_NOTHING = 3e-6  # relative change of a tensor that is the rounding of fp32


def trials(case: Case) -> Iterator[Trial]:
    """Every activation of the layer replaced by every other one; caps left out."""
    yield from _uncapped(case)
    for place in parts.activated(case):
        own = _own_name(case, place)
        for name, function in FUNCTIONS.items():
            if name == own:
                continue
            yield Trial(
                key=f"{place.number} {name}",
                title=f"the activation is {name}, and the reference's is {own or place.name}",
                fault=Fault(operators=_handlers(place, function)),
                parameters={"activation": name, "reference": own or place.name},
                fix=f"export the activation as {own or place.name} (hidden_act of the configuration; "
                "`approximate` of gelu)",
            )


def _uncapped(case: Case) -> Iterator[Trial]:
    """A tanh that caps attention scores, or logits behind the layers, left out (Gemma 2)."""
    activated = {place.first for place in parts.activated(case)} if case.is_layer else set()
    caps = [
        operator
        for operator in case.trace.named("tanh")
        if operator.index not in activated and case.trace.reaches(case.tensor, operator.index)
    ]
    if not caps:
        return
    what = "attention scores" if case.is_layer else "logits"
    handlers: dict[int, Handler] = {
        cap.index: lambda call: call.args[0] if call.args else call.kwargs["input"] for cap in caps
    }
    yield Trial(
        key="uncapped",
        title=f"the {what} are not capped: the reference's go through a tanh",
        fault=Fault(operators=lambda: handlers),
        parameters={"activation": "no cap", "reference": "tanh"},
        fix=f"cap the {what} as the reference does (attn_logit_softcapping, final_logit_softcapping); fused "
        "attention kernels often leave it out",
    )


def _own_name(case: Case, place: parts.Activated) -> str | None:
    """The reference's own, where a name does not tell which it is: the one that changes nothing."""
    if place.name != "gelu" and (place.first == place.last or place.name.startswith("squared")):
        return place.name
    changes = {
        name: float(case.emulated(Fault(operators=_handlers(place, function))).norm())
        for name, function in FUNCTIONS.items()
    }
    nearest = min(changes, key=lambda name: changes[name])
    return nearest if changes[nearest] <= _NOTHING * float(case.valid_clean(case.tensor).norm()) else None


def _handlers(
    place: parts.Activated, function: Callable[[Tensor], Tensor]
) -> Callable[[], dict[int, Handler]]:
    def make() -> dict[int, Handler]:
        kept: list[Tensor] = []

        def keep(call: Call) -> object:
            """Sees the argument: the first operator of a written-out activation."""
            kept.append(call.args[place.argument] if call.args else call.kwargs["input"])
            return call.run()

        def replace(call: Call) -> object:
            if place.first == place.last:
                return function(call.args[0] if call.args else call.kwargs["input"])
            call.run()
            return function(kept[-1])

        return (
            {place.last: replace} if place.first == place.last else {place.first: keep, place.last: replace}
        )

    return make
