"""What lies around the layers of a reference, run on the candidate's hidden states.

The model runs with its layers replaced by their recorded outputs, in which the candidate's hidden states
stand for the reference's: embedding, what joins two stacks, what it does between layers, final norm and head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from divergence.emulation import cast, reduced
from divergence.probes.pytorch.layer_call import (
    Beside,
    CallKey,
    LayerCall,
    floating_beside,
    with_first_tensor,
)
from divergence.probes.pytorch.modes import evaluating
from divergence.probes.pytorch.nested import mapped
from divergence.probes.pytorch.observer import without_hooks, wrapped
from divergence.probes.pytorch.placement import device_of
from divergence.probes.pytorch.probe import output_leaves
from divergence.sites import Site

if TYPE_CHECKING:
    from torch import Tensor

    from divergence.probes.pytorch import PyTorchProbe

Tensors = Callable[[Site], "Tensor | None"]


class Around:
    """Runs a reference around its layers.

    Args:
        probe: the reference, after a run with `record=True`.
        inputs: what that run was given.
        reference: the reference's tensor at a site, or None.
        candidate: the candidate's tensor at a site in the reference's layout, or None.

    Attributes:
        outputs: the model's outputs on the candidate's hidden states by name, once `look` has been called.
    """

    def __init__(
        self, probe: PyTorchProbe, inputs: Mapping[str, Tensor], reference: Tensors, candidate: Tensors
    ) -> None:
        self.outputs: dict[str, Tensor] = {}
        self._probe = probe
        self._inputs = inputs
        self._reference = reference
        self._candidate = candidate
        self._device = device_of(probe.model)
        self._dtype = next(probe.model.parameters()).dtype
        self._starts: dict[CallKey, Tensor] | None = None
        self._beside: dict[CallKey, Beside] = {}

    @property
    def starts(self) -> Mapping[CallKey, Tensor]:
        """The candidate's own input of layers where it is not what the layer before returned: of the first
        ones of stacks, and where the model does something in between. None where what lies outside the layers
        cannot be run on recorded hidden states."""
        if self._starts is None:
            self._starts = {}
            with contextlib.suppress(Exception):
                self.look()
        return self._starts

    def give_up(self) -> None:
        """Has nothing more known of the inputs of layers."""
        self._starts = {}

    def look(self) -> None:
        """Runs the model around its layers on the candidate's hidden states and keeps what they make of the
        inputs of stacks, of the model's outputs, and of what layers are given beside their hidden input."""
        given: dict[CallKey, Beside] = {}
        self._starts, self.outputs = self.run(None, given=given)
        calls = {call.key: call for call in self._probe.calls}
        differing = {
            key: {at: t for at, t in beside.items() if not _equal(t, calls[key].argument(at))}
            for key, beside in given.items()
        }
        if not any(differing.values()):
            return
        # Where an argument follows from something else besides, as from a cache that no layer has filled
        # here, the reference's hidden states do not make it what it was.
        recorded: dict[CallKey, Beside] = {}
        with contextlib.suppress(Exception):
            self.run(None, given=recorded, hidden_of=self._reference)
        self._beside = {
            key: {
                at: t
                for at, t in beside.items()
                if _equal(recorded.get(key, {}).get(at), calls[key].argument(at))
            }
            for key, beside in differing.items()
        }

    def beside(self, call: LayerCall) -> Beside:
        """What the candidate's hidden states make of the floating tensors that a layer is given beside its
        hidden input, where that is not what the reference was given."""
        _ = self.starts
        return self._beside.get(call.key, {})

    def _handed_on(self, output: Any, site: Site) -> Any:
        """What a layer returned, with the candidate's key and value in place of the reference's: a model
        that hands them out as its own outputs then adds no error of its own to them."""
        held = []
        for tensor in ("key", "value"):
            ref, cand = (take(site.with_tensor(tensor)) for take in (self._reference, self._candidate))
            if ref is not None and cand is not None and ref.shape == cand.shape:
                held.append((ref, cand))

        def answered(value: Tensor) -> Tensor:
            for ref, cand in held:
                if value.shape == ref.shape and torch.equal(value.cpu(), ref):
                    return cand.to(value.device, value.dtype)
            return value

        return mapped(output, answered) if held and not isinstance(output, torch.Tensor) else output

    def run(
        self,
        run_in: str | None,
        *,
        within: contextlib.AbstractContextManager[object] | None = None,
        seen: Callable[[Tensor], None] | None = None,
        hidden_of: Tensors | None = None,
        given: dict[CallKey, Beside] | None = None,
    ) -> tuple[dict[CallKey, Tensor], dict[str, Tensor]]:
        """Runs the model with its layers replaced by the candidate's hidden states.

        Args:
            run_in: precision to run it in, None for its own.
            within: entered around the call of the model.
            seen: told of each hidden state before the model sees it.
            hidden_of: other hidden states than the candidate's.
            given: takes what each layer was given beside its hidden input.

        Returns:
            The inputs of layers that are not what the layer before returned, and the model's outputs by name.
        """
        starts: dict[CallKey, Tensor] = {}
        recorded = {call.key: call for call in self._probe.calls}
        returned: dict[str, Tensor] = {}

        def answer(key: CallKey, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            stack, layer, _ = key
            record = recorded[key]
            if given is not None:
                given[key] = floating_beside(args, kwargs, record.hidden_at)
            if record.hidden_at is not None:
                entering = args[at] if isinstance(at := record.hidden_at, int) else kwargs[at]
                if layer == 0 or not _equal(entering, returned.get(stack)):
                    starts[key] = entering.clone() if layer else entering
            hidden = self._hidden(record, hidden_of or self._candidate)
            hidden = hidden if run_in is None else cast(hidden, run_in)
            returned[stack] = hidden.clone()  # the model may write into it
            if seen is not None:
                seen(hidden)
            return self._handed_on(with_first_tensor(record.output, hidden), record.site)

        model = self._probe.model
        own = self._probe.own(self._inputs)
        inputs = {name: tensor.to(self._device, copy=True) for name, tensor in own.items()}
        with contextlib.ExitStack() as active:
            active.enter_context(evaluating(model))
            active.enter_context(torch.inference_mode())
            layers = [layer for stack in self._probe.stacks for layer in stack.layers]
            if run_in is not None:
                active.enter_context(reduced(layers, run_in, rest=model))
                inputs = cast(inputs, run_in)
            # Recorded hidden states are what they made of them.
            active.enter_context(without_hooks(dict.fromkeys(layers), before=False))
            for stack in self._probe.stacks:
                for index, layer in enumerate(dict.fromkeys(stack.layers)):
                    active.enter_context(wrapped(layer, _counted(stack.name, index, answer)))
            if within is not None:
                active.enter_context(within)
            outputs = model(**inputs)
        return starts, dict(output_leaves(outputs))

    def _hidden(self, record: LayerCall, tensors: Tensors) -> Tensor:
        """The hidden state that a layer is to return, the reference's where `tensors` has none."""
        hidden = tensors(record.site)
        hidden = self._reference(record.site) if hidden is None else hidden
        if hidden is None:
            raise LookupError(f"no hidden state at {record.site}")
        return hidden.to(record.device_out or self._device, self._dtype, copy=True)


def _counted(stack: str, layer: int, answer: Callable[..., Any]) -> Callable[..., Any]:
    """Stands for a layer: each call is answered by its number."""
    count = 0

    def call(_: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return answer((stack, layer, count), args, kwargs)

    return call


def _equal(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    return one is other or (one.device == other.device and torch.equal(one, other))
