"""Precision of each part of a model: what its weights are kept in, and the hidden states around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from divergence.precision import coarsest, dtype_name
from divergence.probes import EMBEDDING, HEAD
from divergence.sites import Site

if TYPE_CHECKING:
    from torch import nn

    from divergence.probes.pytorch.stacks import Stack


def mixture(
    model: nn.Module, stacks: Sequence[Stack], hidden: Mapping[tuple[str, int], str]
) -> dict[str, str]:
    """Precision by part: layers (`layers.3`), what is registered before them (`embedding`) and the rest
    (`head`); empty where it is the same everywhere.

    A part is as coarse as the coarsest of its weights and of the hidden states that go into it and out of it:
    a norm with weights in fp32 rounds to what it is given.

    Args:
        model: the whole.
        stacks: its layers.
        hidden: dtypes of the layers' hidden states, by stack and number.
    """
    inside = {id(p) for stack in stacks for layer in stack.layers for p in layer.parameters()}
    outside: dict[str, list[str]] = {EMBEDDING: [], HEAD: []}
    part = EMBEDDING
    for parameter in model.parameters():
        if id(parameter) in inside:
            part = HEAD
        else:
            outside[part].append(dtype_name(parameter.dtype))
    found = {EMBEDDING: coarsest(outside[EMBEDDING])}
    for stack in stacks:
        before: list[str] = []
        for index, layer in enumerate(stack.layers):
            shown = hidden.get((stack.name, index))
            own = [] if shown is None else [shown]
            kept = [dtype_name(parameter.dtype) for parameter in layer.parameters()]
            found[Site(index, "hidden", stack.name).part] = coarsest([*kept, *before, *own]) if kept else None
            before = own
        outside[HEAD] += before if outside[HEAD] else []
    found[HEAD] = coarsest(outside[HEAD])
    known = {name: precision for name, precision in found.items() if precision is not None}
    return known if len(set(known.values())) > 1 else {}
