"""Faults to plant into models of transformers, and the case that a comparison makes of one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import divergence
from divergence.diagnosis import search
from divergence.diagnosis.case import Case
from divergence.diagnosis.hypotheses import Tried
from divergence.result import Comparison

Plant = Callable[[Any], None]


def planted(model: nn.Module, fault: Plant) -> nn.Module:
    """A copy of `model` with the fault in it."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        fault(made)
    return made


def layer(model: Any, index: int) -> Any:
    """A layer of a decoder of transformers."""
    inner = getattr(model, "model", None) or model.transformer
    layers = inner.layers if hasattr(inner, "layers") else inner.h
    return layers[index]


def every(change: Callable[[Any], None]) -> Plant:
    """`change` done to every layer."""

    def fault(model: Any) -> None:
        inner = getattr(model, "model", None) or model.transformer
        for one in inner.layers if hasattr(inner, "layers") else inner.h:
            change(one)

    return fault


def rotary(angles: Callable[[Tensor, Tensor], Tensor]) -> Plant:
    """The rotary embedding with other angles, of positions `[batch, token, 1]` and inverse frequencies."""

    def fault(model: Any) -> None:
        module = model.model.rotary_emb

        def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            angle = angles(position_ids[:, :, None].float(), module.inv_freq.float()).float()
            both = torch.cat((angle, angle), -1)
            return both.cos().to(x.dtype), both.sin().to(x.dtype)

        module.forward = forward

    return fault


def diagnosed(
    reference: nn.Module, candidate: object, inputs: Mapping[str, Tensor], **options: Any
) -> Comparison:
    """The comparison, which has to fail."""
    result = divergence.compare(reference, candidate, inputs, **options)
    assert result.verdict == "fail", result.reason
    return result


def case_of(reference: nn.Module, candidate: nn.Module, inputs: Mapping[str, Tensor]) -> Case:
    """The case of the first layer that fails."""
    seen: list[Case] = []

    def keep(case: Case) -> list[Tried]:
        assert case.error  # read while the captures are there
        seen.append(case)
        return []

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(search, "investigate", keep)
        diagnosed(reference, candidate, inputs)
    return seen[0]
