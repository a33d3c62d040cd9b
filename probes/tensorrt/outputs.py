"""Which tensors of an engine are sites."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from divergence.comparison import compare_tensors
from divergence.errors import ConfigurationError, nearest
from divergence.probes.onnx.found import Found
from divergence.probes.onnx.names import declared_tensor, site_named
from divergence.probes.onnx.outputs import name_outputs
from divergence.probes.tensorrt.sidecar import Sidecar
from divergence.sites import Site, in_execution_order

if TYPE_CHECKING:
    import torch

    from divergence.captures import Capture

_SHORT = re.compile(r"(?:layers?[._]?)?(?:(\d+)[._])?(key|value|hidden|k|v)(?:[._](\d+))?", re.IGNORECASE)
_NEAR, _FAR = 0.5, 3.0
_TENSORS = {"k": "key", "v": "value"}


def sites_of(
    tensors: Sequence[str],
    sidecar: Sidecar | None,
    overrides: Mapping[str, str],
    path: str,
    stacks: Sequence[str] = (),
) -> list[Found]:
    """The sites among the tensors that an engine gives, in execution order, outputs last.

    The configuration takes precedence over the sidecar, and that over the names of outputs
    (`layers.3.key`, `key_3`, `present.3.key`). A tensor that is none of a layer is a model output,
    which alignment takes apart where it stacks the layers.

    Args:
        tensors: names of outputs and debug tensors.
        sidecar: the engine's map, if it has one.
        overrides: name of a tensor by site.
        path: of the engine, for messages.
        stacks: names of the reference's stacks; a single one names the sites that output names give.

    Raises:
        ConfigurationError: `overrides` names no site, or a tensor that the engine does not give.
    """
    stack = stacks[0] if len(stacks) == 1 else ""
    found: dict[Site, Found] = {}
    for item in (*_overridden(tensors, overrides, path), *_mapped(tensors, sidecar), *_named(tensors, stack)):
        found.setdefault(item.site, item)
    taken = {item.value for item in found.values()}
    own = set(sidecar.own_outputs) if sidecar else set()
    own -= {item.value for item in _named(tensors, stack)}  # an output that says which site it is
    for name in tensors:
        if name not in taken or name in own:
            site = Site.output(name)
            found[site] = Found(site, name, (), f"output {name} of the engine", "output")
    order = dict.fromkeys(site.stack for site in found if site.layer is not None)
    return [found[site] for site in in_execution_order(found, tuple(order) or ("",))]


def name_as_reference(
    found: Sequence[Found], tensors: Mapping[str, torch.Tensor], reference: Capture
) -> list[Found]:
    """Calls the model outputs among `found` what the reference calls them.

    By equal name, else by a shape that only one of each has, else by value: of outputs of one shape, the
    one that is near, where every other is several times as far. An output that matches none keeps its
    own name. A reference whose model returns a tuple has numbers for names.
    """
    outputs = [f.value for f in found if f.site.layer is None]
    shapes = {name: tuple(tensors[name].shape) for name in outputs}
    named = {f.value: f for f in name_outputs(outputs, shapes, reference, lambda _: ())}
    taken = {f.site for f in named.values()}
    free = [s for s in reference.sites if s.layer is None and s not in taken]
    own = {f.value for f in named.values() if f.site.tensor == f.value and f.site not in reference.entries}
    for site in free:
        distances = {
            name: compare_tensors(reference.tensor(site), tensors[name]).rel_l2 or 0.0
            for name in own
            if shapes[name] == reference.entries[site].shape
        }
        near = sorted(distances, key=distances.__getitem__)
        alone = all(distances[name] > _FAR * distances[near[0]] for name in near[1:])
        if near and alone and distances[near[0]] < _NEAR:
            how = f"output {near[0]} of the engine, by its value"
            named[near[0]] = Found(site, near[0], (), how, "output")
            own.discard(near[0])
    return [named.get(f.value, f) if f.site.layer is None else f for f in found]


def _overridden(tensors: Sequence[str], overrides: Mapping[str, str], path: str) -> Iterable[Found]:
    for text, name in overrides.items():
        site = Site.parse(text)
        if name not in tensors:
            raise ConfigurationError(
                f"{path}: sites maps {text} to '{name}', and the engine gives no such tensor"
                f"{nearest(name, tensors)}"
            )
        yield Found(site, name, site.axes, f"configured as {name}", "override")


def _mapped(tensors: Sequence[str], sidecar: Sidecar | None) -> Iterable[Found]:
    for output in sidecar.outputs if sidecar else ():
        if output.name in tensors:
            yield output.as_found()


def _named(tensors: Sequence[str], stack: str) -> Iterable[Found]:
    for name in tensors:
        site = site_named(name)
        declared = _short_name(name) or declared_tensor(name)
        if site is None and declared is not None:
            site = Site(*declared, stack)
        if site is not None:
            yield Found(site, name, site.axes, f"output named {name}", "name")


def _short_name(name: str) -> tuple[int, str] | None:
    """Layer and tensor of `key_3`, `layer_3_hidden`, `v.3`; None for any other name, `hidden_states_3`
    among them, which may be a layer's input."""
    match = _SHORT.fullmatch(name)
    if match is None:
        return None
    indices = [text for text in (match[1], match[3]) if text is not None]
    if len(indices) != 1:
        return None
    tensor = match[2].lower()
    return int(indices[0]), _TENSORS.get(tensor, tensor)
