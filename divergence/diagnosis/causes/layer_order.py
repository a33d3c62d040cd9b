"""A layer that holds the weights of another, or whose keys and values are handed out as those of another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from divergence.diagnosis import cache
from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Change, Fault, LayerUnit
from divergence.diagnosis.hypotheses import Trial
from divergence.probes.pytorch.placement import named_weights
from divergence.sites import KEYS_AND_VALUES, Site

if TYPE_CHECKING:
    from torch import Tensor, nn

ID = "layer_order"

_SAME = 0.1  # relative difference below which two tensors are the same but for rounding


def trials(case: Case) -> Iterator[Trial]:
    """Keys and values of another layer in the place of this one's; then the weights of every other layer of
    the stack, nearest first."""
    yield from _handed_out(case)
    # Another layer's weights show in the first tensor that a layer makes.
    if not isinstance(case.unit, LayerUnit) or (case.tensor == "hidden" and "key" in case.error):
        return
    own = case.unit.call.layer
    layers = case.unit.stack
    for other in sorted((i for i in range(len(layers)) if i != own), key=lambda i: abs(i - own)):
        changes = taken_from(case.unit.module, layers[other])
        if changes is None:
            continue
        yield Trial(
            key=f"offset {other - own}",
            title=f"layer {own} holds the weights of layer {other}",
            fault=Fault(parameters=changes),
            parameters={"layer": own, "holds": other},
            fix=f"load layer {other}'s weights where layer {other} runs: check the order of layers in the "
            "converter (sort "
            "by number, not by name: 'layers.10' sorts before 'layers.2')",
        )


def _handed_out(case: Case) -> Iterator[Trial]:
    """What the candidate shows is what another layer of this run has made, and attention read the right."""
    pair = next((pair for pair in KEYS_AND_VALUES if case.tensor in pair), ())
    if not isinstance(case.unit, LayerUnit) or "hidden" in case.failing or case.applied:
        return
    names = [name for name in pair if name in case.failing and name in case.error]
    found = {name: _layer_of(case, name) for name in names}
    other = found.get(case.tensor)
    if other is None:
        return
    made = {name: _of_layer(case, name, other) for name in names if found[name] == other}
    tensors = {name: tensor for name, tensor in made.items() if tensor is not None}
    own, words = case.unit.call.layer, " and ".join(f"{name}s" for name in tensors)

    def passes(case: Case, _: float) -> list[str]:
        if "hidden" not in case.error:
            return []
        return [f"{case.site_of('hidden')} passes, so attention in this layer read the right ones"]

    yield Trial(
        key="handed out",
        title=f"the {words} that are handed out as layer {own}'s are those of layer {other}",
        fault=cache.replaced(case, tensors, read=False),
        parameters={"layer": own, "holds": other, "exchanged": "outputs"},
        evidence=passes,
        fix="stack, name and bind the outputs by the number of the layer: sort by number, not by name "
        "('10' sorts before '2')",
    )


def _layer_of(case: Case, name: str) -> int | None:
    """The other layer of the reference whose tensor the candidate's is."""
    assert isinstance(case.unit, LayerUnit)
    seen = case.valid(name, case.candidate[name])
    for layer in range(len(case.unit.stack)):
        tensor = _of_layer(case, name, layer)
        if layer != case.unit.call.layer and tensor is not None:
            left = float((seen - case.valid(name, tensor)).norm())
            if left < _SAME * float(seen.norm()):
                return layer
    return None


def _of_layer(case: Case, name: str, layer: int) -> Tensor | None:
    """The reference's tensor of that name at another layer, where its shape is that of this one."""
    site = Site(layer, name, case.at.stack, case.at.call)
    tensor = case.given.reference(site) if str(site) in case.given.results else None
    clean = case.clean[name]
    return None if tensor is None or tensor.shape != clean.shape else tensor.to(clean.device)


def taken_from(module: nn.Module, other: nn.Module) -> dict[str, Change] | None:
    """Changes that give `module` the parameters of `other`; None where these differ in names or shapes."""
    mine, theirs = dict(module.named_parameters()), dict(other.named_parameters())
    if module is other or {n: p.shape for n, p in mine.items()} != {n: p.shape for n, p in theirs.items()}:
        return None
    return {name: _constant(weight.detach()) for name, weight in named_weights(other)}


def _constant(tensor: Tensor) -> Change:
    return lambda own: tensor.to(own.device, own.dtype)
