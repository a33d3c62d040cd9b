"""Five faults planted into SmolLM2-135M, as PyTorch candidates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import divergence
from divergence.config import Config
from tests import smollm2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not smollm2.available(), reason="no SmolLM2 in .models; make setup fetches it"),
    pytest.mark.filterwarnings("ignore"),
]


def value_gain(model: Any) -> Any:
    model.model.layers[11].self_attn.v_proj.weight.mul_(1.02)
    return smollm2.half(model)


def key_heads(model: Any) -> Any:
    """The three key heads of one layer, each in the place of the next."""
    weight = model.model.layers[17].self_attn.k_proj.weight
    weight.copy_(weight.roll(64, 0))
    return model


def other_activation(model: Any) -> Any:
    model.model.layers[20].mlp.act_fn = nn.GELU()
    return model


def int8_down(model: Any) -> Any:
    weight = model.model.layers[8].mlp.down_proj.weight
    step = weight.abs().max() / 127
    weight.copy_((weight / step).round() * step)
    return model


def rotary_bf16(model: Any) -> Any:
    context = smollm2.rotary_in_bf16(model)
    context.__enter__()
    # Kept from being closed, which would mend the fault.
    model.planted = context
    return model


FAULTS: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "value-gain-fp16": (value_gain, "layers.11.value", "weight_scale"),
    "key-heads": (key_heads, "layers.17.key", "weight_permuted"),
    "gelu-for-silu": (other_activation, "layers.20.hidden", "activation"),
    "int8-down": (int8_down, "layers.8.hidden", "quant_int8"),
    "rotary-bf16": (rotary_bf16, "layers.0.key", "rope_precision"),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return smollm2.load()


@pytest.fixture(scope="module")
def prompt() -> Any:
    return smollm2.inputs()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_smollm2_is_found(model: Any, prompt: Any, fault: str) -> None:
    plant, site, cause = FAULTS[fault]
    with torch.no_grad():
        candidate = plant(copy.deepcopy(model))
    result = divergence.compare(model, candidate, prompt, config=Config())
    assert result.verdict == "fail"
    assert result.first_divergence is not None and result.first_divergence.site == site, result.reason
    assert (result.causes[0].id, result.causes[0].site) == (cause, site)
