"""What a layer was called with and what it returned: found, taken apart, kept for a replay."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from divergence.probes.pytorch.nested import mapped
from divergence.sites import Site

_HIDDEN_NAMES = ("hidden_states", "hidden", "x", "src", "tgt", "input", "inputs")


CallKey = tuple[str, int, int]
Beside = dict[int | str, Tensor]
"""Floating tensors that a layer is given beside its hidden input, by position or name."""


@dataclass
class LayerCall:
    """One call of one layer within a run, kept so that it can be replayed.

    Attributes:
        stack, layer, call: the address.
        module: the layer.
        args, kwargs: what it was called with; the hidden input is taken out.
        hidden_at: where the hidden input belongs: position in `args` or name in `kwargs`.
        first_input: the hidden input itself `[batch, token, channel]`, kept for the first layer of a stack,
            and for those that do not follow the one before.
        follows: whether the hidden input is what the layer before returned.
        output: what it returned; the hidden output is taken out.
        device_in, device_out: where the hidden input and output were; layers may lie on several devices.
    """

    stack: str
    layer: int
    call: int
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_at: int | str | None = None
    first_input: Tensor | None = None
    follows: bool = False
    output: Any = None
    device_in: torch.device | None = None
    device_out: torch.device | None = None

    @property
    def key(self) -> CallKey:
        """Stack, layer and call."""
        return self.stack, self.layer, self.call

    @property
    def site(self) -> Site:
        """Its hidden output."""
        return Site(self.layer, "hidden", self.stack, self.call)

    def argument(self, at: int | str) -> Any:
        """What it was given at a position or by a name, None where it was not."""
        if isinstance(at, int):
            return self.args[at] if at < len(self.args) else None
        return self.kwargs.get(at)


def first_tensor(output: Any) -> Tensor | None:
    """The hidden state in what a layer returned: the tensor itself, a field of that name, or the
    first tensor of a sequence, of a mapping, or among the attributes of an object."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for name in ("hidden_states", "last_hidden_state"):
            if isinstance(output.get(name), Tensor):
                return output[name]  # type: ignore[no-any-return]
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        return next((value for value in output if isinstance(value, Tensor)), None)
    attributes = getattr(output, "__dict__", None)
    return first_tensor(attributes) if isinstance(attributes, dict) else None


def with_first_tensor(output: Any, tensor: Tensor | None) -> Any:
    """`output` with its hidden state (see `first_tensor`; None marks a hole left by this function)
    replaced by `tensor`."""
    if isinstance(output, Tensor) or output is None:
        return tensor
    if isinstance(output, Mapping):
        names = [n for n, v in output.items() if isinstance(v, Tensor) or v is None]
        name = next((n for n in ("hidden_states", "last_hidden_state") if n in names), names[0])
        replacement = copy.copy(output)
        replacement[name] = tensor  # type: ignore[index]
        return replacement
    if not isinstance(output, tuple | list):
        made = copy.copy(output)
        made.__dict__.update(with_first_tensor(vars(output), tensor))
        return made
    index = next(i for i, v in enumerate(output) if isinstance(v, Tensor) or v is None)
    values: list[Any] = [tensor if i == index else v for i, v in enumerate(output)]
    if hasattr(output, "_fields"):
        return type(output)(*values)
    return type(output)(values)


def replaced(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], at: int | str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the one `at` a position or name replaced."""
    if isinstance(at, int):
        return (*args[:at], value, *args[at + 1 :]), dict(kwargs)
    return args, {**kwargs, at: value}


def floating_beside(args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden_at: int | str | None) -> Beside:
    """The floating tensors among a layer's arguments without its hidden input."""
    return {at: v for at, v in _floating(args, kwargs) if at != hidden_at}


def find_hidden(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], previous: Tensor | None, others: Sequence[Tensor] = ()
) -> int | str | None:
    """Which argument is the hidden input: the previous layer's output itself, else a floating tensor in first
    position or under a usual name, else the first floating tensor.

    Args:
        args, kwargs: of the layer.
        previous: output of the layer before it in its stack.
        others: last outputs of other stacks, which a layer attends to; taken if there is nothing else.
    """
    floating = _floating(args, kwargs)
    for at, value in floating:
        if value is previous:
            return at
    own = [(at, v) for at, v in floating if not any(v is other for other in others)] or floating
    named = [at for at, _ in own if at == 0 or at in _HIDDEN_NAMES]
    if named:
        return named[0]
    return own[0][0] if own else None


def _floating(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[int | str, Tensor]]:
    slots: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return [(at, v) for at, v in slots if isinstance(v, Tensor) and v.is_floating_point()]


def snapshots(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], layer: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with copies, which later updates of the originals do not reach, of lists and dicts of
    states, and of caches with what `layer` has in them. A cache that makes new tensors (`DynamicCache`)
    shares them; other values are what they are."""
    return tuple(_snapshot(v, layer) for v in args), {name: _snapshot(v, layer) for name, v in kwargs.items()}


def _snapshot(value: Any, layer: int) -> Any:
    if type(value) in (list, dict):
        return mapped(value, _copied)
    if isinstance(value, Tensor | nn.Module | str) or not hasattr(value, "update"):
        return value
    if isinstance(value, Mapping):
        return type(value)(value)  # type: ignore[call-arg]

    def part(at: Any, item: Any) -> Any:
        """Of what is numbered, another layer's is shared."""
        return item if isinstance(at, int) and at != layer else _part_of_cache(item)

    taken = copy.copy(value)
    for name, attribute in vars(value).items():
        if isinstance(attribute, list):
            setattr(taken, name, [part(at, item) for at, item in enumerate(attribute)])
        elif isinstance(attribute, dict):
            setattr(taken, name, {at: part(at, item) for at, item in attribute.items()})
        elif hasattr(attribute, "update") and not isinstance(attribute, Tensor | nn.Module):
            setattr(taken, name, _snapshot(attribute, layer))
    return taken


def _part_of_cache(part: Any) -> Any:
    if isinstance(part, Tensor) or not hasattr(part, "__dict__"):
        return mapped(part, _copied)
    taken = copy.copy(part)
    makes_new = any("dynamic" in base.__name__.lower() for base in type(part).__mro__)
    for name, attribute in vars(part).items():
        if type(attribute) in (list, dict) or (isinstance(attribute, Tensor) and not makes_new):
            setattr(taken, name, mapped(attribute, _copied))
    return taken


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
