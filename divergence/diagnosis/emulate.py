"""Puts a fault into the reference and runs the part of it that is under suspicion."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from divergence.diagnosis.trace import Handler, Interceptor, Trace

if TYPE_CHECKING:
    from divergence.probes.pytorch.layer_call import LayerCall
    from divergence.replay import Replayer

Tensors = dict[str, Tensor]
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Fault:
    """What an emulation does to the reference.

    Attributes:
        parameters: a change for each parameter concerned, by its name within the unit.
        operators: makes, for one run, handlers by operator number (see `trace.Interceptor`).
        outputs: a change of the tensors that the unit shows, by tensor name.
        hidden: a change of the unit's hidden input.
    """

    parameters: Mapping[str, Change] = field(default_factory=dict)
    operators: Callable[[], Mapping[int, Handler]] | None = None
    outputs: Callable[[Tensors], Tensors] | None = None
    hidden: Change | None = None


class LayerUnit:
    """A layer on the candidate's own input to it.

    Args:
        replayer: runs it.
        call: which call of which layer.
        hidden: the input `[batch, token, channel]`.
        stack: all layers of its stack.
        after: the layer whose tensors are looked at instead, where the candidate shows nothing of this
            one's output: it runs, without a fault, on what this one returns.
    """

    def __init__(
        self,
        replayer: Replayer,
        call: LayerCall,
        hidden: Tensor,
        stack: Sequence[nn.Module] = (),
        after: LayerCall | None = None,
    ) -> None:
        self.module: nn.Module = call.module
        self.call = call
        self.hidden = hidden
        self.stack = tuple(stack)
        self._replayer = replayer
        self._after = after

    def run(
        self,
        faults: Sequence[Fault] = (),
        trace: Trace | None = None,
        reuse: Mapping[int, Tensor] | None = None,
    ) -> Tensors:
        """Tensors of the layer by name.

        Args:
            faults: put in.
            trace: records the operators.
            reuse: what operators return instead of being computed, by number.
        """
        hidden = self.hidden.clone()  # a layer may write into it
        for fault in faults:
            hidden = hidden if fault.hidden is None else fault.hidden(hidden)
        with faulty(self.module, faults, trace, reuse) as mode:
            if trace is not None:
                trace.mark_input(hidden)
            seen = trace.mark_site if trace is not None and self._after is None else None
            tensors = self._replayer.run_layer(self.call, hidden, None, within=mode, seen=seen)
        if self._after is not None:
            tensors = self._replayer.run_layer(self._after, tensors["hidden"], None)
        for fault in faults:
            tensors = tensors if fault.outputs is None else fault.outputs(tensors)
        return tensors


class OutsideUnit:
    """What lies outside the layers, on the candidate's hidden states: final norm and head.

    Args:
        replayer: runs it.
        model: the whole reference.
    """

    def __init__(self, replayer: Replayer, model: nn.Module) -> None:
        self.module = model
        self.call: LayerCall | None = None
        self._replayer = replayer

    def run(
        self,
        faults: Sequence[Fault] = (),
        trace: Trace | None = None,
        reuse: Mapping[int, Tensor] | None = None,
    ) -> Tensors:
        """The model's outputs by name; arguments as of `LayerUnit.run`."""
        with faulty(self.module, faults, trace, reuse) as mode:
            seen = trace.mark_input if trace is not None else None
            _, tensors = self._replayer.around.run(None, within=mode, seen=seen)
        for fault in faults:
            tensors = tensors if fault.outputs is None else fault.outputs(tensors)
        return tensors


Unit = LayerUnit | OutsideUnit


@contextlib.contextmanager
def faulty(
    module: nn.Module,
    faults: Sequence[Fault],
    trace: Trace | None = None,
    reuse: Mapping[int, Tensor] | None = None,
) -> Iterator[Interceptor]:
    """Changes parameters of `module` for the duration, and hands over a mode that changes operators."""
    handlers: dict[int, list[Handler]] = {}
    for index, result in (reuse or {}).items():
        handlers[index] = [_returning(result)]
    for fault in faults:
        for index, handler in (fault.operators() if fault.operators else {}).items():
            handlers.setdefault(index, []).append(handler)
    changed: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    try:
        for fault in faults:
            for name, change in fault.parameters.items():
                owner, leaf = _owner(module, name)
                parameter = owner._parameters[leaf]
                assert parameter is not None
                changed.append((owner, leaf, parameter))
                owner._parameters[leaf] = nn.Parameter(change(parameter.detach()), requires_grad=False)
        if trace is not None:
            trace.name_parameters(dict(module.named_parameters()))
        yield Interceptor(handlers, trace)
    finally:
        for owner, leaf, parameter in reversed(changed):
            owner._parameters[leaf] = parameter


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _returning(result: Tensor) -> Handler:
    return lambda _: result
