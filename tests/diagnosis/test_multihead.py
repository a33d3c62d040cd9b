"""Faults inside nn.MultiheadAttention are named, in such a module and in one written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from divergence import compare
from divergence.diagnosis import weights
from tests.diagnosis.faults import case_of, diagnosed
from tests.multihead import HEADS, WIDTH, Heads, Ported, given

Change = Callable[[Tensor], Tensor]


def packed(change: Change) -> Callable[[Any], None]:
    """Changes the packed projection of the second layer's own attention, weight and bias."""

    def fault(model: Any) -> None:
        attention = model.layers[1].self_attn
        for parameter in (attention.in_proj_weight, attention.in_proj_bias):
            parameter.copy_(change(parameter.clone()))

    return fault


def exchanged(rows: Tensor) -> Tensor:
    query, key, value = rows.chunk(3)
    return torch.cat((query, value, key))


def values_of_heads(rows: Tensor) -> Tensor:
    query, key, value = rows.chunk(3)
    return torch.cat((query, key, value.unflatten(0, (HEADS, -1))[[1, 2, 3, 0]].flatten(0, 1)))


def changed(model: Heads, fault: Callable[[Any], None]) -> Heads:
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        fault(wrong)
    return wrong


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_port_by_hand_passes(batch_first: bool, explicit: bool) -> None:
    reference = Heads(batch_first=batch_first, weights=explicit)
    inputs = given(padded=True, tokens=12)
    result = compare(reference, Ported(reference), inputs)
    # With the token first inside the reference, its hidden states lie otherwise than the port's.
    assert {"layers.0.key", "layers.2.value"} <= {s.site for s in result.sites if s.verdict == "pass"}
    if batch_first:
        assert result.verdict == "pass", result.reason


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ({"scale": 0.5}, "attention_scale"),
        ({"ahead": 1}, "mask_leak"),
        ({"softmax": torch.bfloat16}, "softmax_precision"),
    ],
)
def test_faults_of_scores_are_named(fault: dict[str, Any], cause: str, explicit: bool) -> None:
    reference = Heads(weights=explicit)
    result = diagnosed(reference, Ported(reference, **fault), given(tokens=24))
    assert (result.causes[0].id, result.causes[0].site) == (cause, "layers.1.hidden")
    assert result.causes[0].explained is not None and result.causes[0].explained > 0.9


@pytest.mark.parametrize("explicit", [True, False])
def test_padding_that_is_seen_is_named(explicit: bool) -> None:
    class Blind(Heads):
        def forward(self, x: Tensor, padding: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
            padding = None if padding is None else torch.zeros_like(padding)
            return super().forward(x, padding, memory)

    reference = Heads(weights=explicit)
    inputs = given(padded=True, tokens=12)
    # Left padding: with a causal mask nothing else can see it.
    inputs["padding"] = inputs["padding"].flip(1)
    inputs["padding"][0, 0] = False
    result = diagnosed(reference, Blind(weights=explicit), inputs)
    assert result.causes[0].id in ("mask_leak", "mask_missing")
    assert result.causes[0].explained is not None and result.causes[0].explained > 0.9


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize(
    ("change", "site", "cause"),
    [
        (exchanged, "key", "kv_swapped"),
        (values_of_heads, "value", "weight_permuted"),
        (lambda rows: torch.cat((rows[: 2 * WIDTH], rows[2 * WIDTH :] * 1.2)), "value", "weight_scale"),
    ],
)
def test_faults_of_the_packed_projection_are_named(
    change: Change, site: str, cause: str, explicit: bool
) -> None:
    reference = Heads(weights=explicit)
    result = diagnosed(reference, changed(reference, packed(change)), given(padded=True, tokens=24))
    assert (result.causes[0].id, result.causes[0].site) == (cause, f"layers.1.{site}")
    assert result.causes[0].explained is not None and result.causes[0].explained > 0.9


@pytest.mark.parametrize("explicit", [True, False])
def test_the_packed_projection_of_cross_attention_is_taken_apart(explicit: bool) -> None:
    reference, inputs = Heads(weights=explicit), given(memory=WIDTH, tokens=12)
    wrong = changed(reference, lambda model: model.layers[1].cross_attn.in_proj_weight[WIDTH:].mul_(1.2))
    case = case_of(reference, wrong, inputs)
    assert case.tensor == "cross_key"
    for tensor, role, start in (("cross_key", "key", WIDTH), ("cross_value", "value", 2 * WIDTH)):
        part = weights.projection(case, tensor)
        assert part is not None
        assert (part.name, part.role, part.start) == ("cross_attn.in_proj_weight", role, start)
        bias = weights.bias_of(case, part)
        assert bias is not None and (bias.name, bias.start) == ("cross_attn.in_proj_bias", start)
    own = weights.projection(case, "key")
    assert own is not None and str(own) == "self_attn.in_proj_weight (key)"


def test_a_packed_weight_that_is_rounded_as_a_whole_is_one_cause() -> None:
    def fp8(weight: Tensor) -> Tensor:
        step = weight.abs().max() / 448
        return (weight / step).to(torch.float8_e4m3fn).float() * step

    reference = Heads()
    wrong = changed(
        reference,
        lambda model: model.layers[1].self_attn.in_proj_weight.copy_(
            fp8(model.layers[1].self_attn.in_proj_weight)
        ),
    )
    result = diagnosed(reference, wrong, given(tokens=24))
    assert [c.id for c in result.causes] == ["quant_fp8"]
    assert result.causes[0].parameters["parameters"] == ["self_attn.in_proj_weight"]
