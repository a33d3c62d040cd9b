"""Where a model's weights are: on one device or several, or brought in for each call and taken away again.

Accelerate's hooks (`dispatch_model`, `cpu_offload`, `device_map`) move what goes into a module to its
device, and where weights are offloaded put them into the module before each call and empty (`meta`)
ones after. They are recognised by what they have, without importing accelerate.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_HOOKED = ("_hf_hook", "_old_forward", "forward")
"""What accelerate adds to a module's own attributes."""


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs belong: where its hook sends them, else where its first parameter or buffer
    lives; the CPU if it has neither."""
    for hook in _hooks(model):
        if hook.execution_device is not None:
            return torch.device(hook.execution_device)
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    inner = [hook for module in model.modules() for hook in _hooks(module)]
    found = next((hook.execution_device for hook in inner if hook.execution_device is not None), "cpu")
    return torch.device(found)


def devices_of(model: nn.Module) -> list[str]:
    """The devices that the model runs on, in the order of its modules, and `offloaded` if some of its
    weights are on none of them."""
    found: dict[str, None] = {}
    for module in model.modules():
        for hook in _hooks(module):
            if hook.execution_device is not None:
                found[str(torch.device(hook.execution_device))] = None
        for tensor in module.parameters(recurse=False):
            found["offloaded" if tensor.device.type == "meta" else str(tensor.device)] = None
    return list(found)


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters by name; those that are offloaded are read from where they are."""
    elsewhere: dict[int, tuple[Mapping[str, Tensor], str]] = {}
    for module in model.modules():
        for hook in _loading(module):
            for owner, leaf, name in _emptied(module, hook):
                tensor = getattr(owner, leaf)
                elsewhere[id(tensor)] = hook.weights_map, name
    for name, parameter in model.named_parameters():
        if id(parameter) in elsewhere:
            weights, key = elsewhere[id(parameter)]
            yield name, weights[key]
        else:
            yield name, parameter


@contextlib.contextmanager
def brought_in(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Offloaded weights of `modules` are in their modules for the duration, where they can be looked at
    and changed, and their hooks leave them alone."""
    quiet: list[Any] = []
    emptied: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in modules:
            for hook in list(_loading(module)):
                for owner, leaf, name in list(_emptied(module, hook)):
                    home = owner._parameters if leaf in owner._parameters else owner._buffers
                    empty = home[leaf]
                    assert empty is not None
                    value = hook.weights_map[name].to(hook.execution_device, empty.dtype)
                    emptied.append((home, leaf, empty))
                    is_parameter = isinstance(empty, nn.Parameter)
                    home[leaf] = nn.Parameter(value, requires_grad=False) if is_parameter else value
                quiet.append(hook)
                hook.offload = False
        yield
    finally:
        for hook in quiet:
            hook.offload = True
        for home, leaf, empty in reversed(emptied):
            home[leaf] = empty


@contextlib.contextmanager
def unhooked(module: nn.Module) -> Iterator[None]:
    """`module` without hooks for the duration, so that it can be pickled."""
    taken: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        hooked = [inner for inner in module.modules() if "_hf_hook" in inner.__dict__]
        taken += [(inner, {name: inner.__dict__.pop(name, None) for name in _HOOKED}) for inner in hooked]
        yield
    finally:
        for inner, attributes in taken:
            inner.__dict__.update(attributes)


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Accelerate's hooks of a module that know a device."""
    hook = module.__dict__.get("_hf_hook")  # asked by name, a module without one raises and catches an error
    for one in getattr(hook, "hooks", (hook,)):
        if hasattr(one, "execution_device"):
            yield one


def _loading(module: nn.Module) -> Iterator[Any]:
    """Those that bring in weights for each call."""
    for hook in _hooks(module):
        if getattr(hook, "offload", False) is True and getattr(hook, "weights_map", None) is not None:
            yield hook


def _emptied(module: nn.Module, hook: Any) -> Iterator[tuple[nn.Module, str, str]]:
    """Module, attribute and name in the hook's map of each tensor that `hook` has taken away."""
    for path, owner in module.named_modules() if hook.place_submodules else [("", module)]:
        for leaf, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None and tensor.device.type == "meta":
                yield owner, leaf, f"{path}.{leaf}".lstrip(".")
