"""Candidates whose parts run in different precisions: each is judged by its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import divergence
from divergence.introduced import mixed_note
from divergence.probes.pytorch import PyTorchProbe
from divergence.result import Comparison
from tests.fewer_bits import in_half
from tests.models import inputs_for, llama

HALF = "bf16"
SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def compared(plant: Callable[[Any], None], **options: Any) -> Comparison:
    candidate = llama(4, **SIZES)
    with torch.no_grad():
        plant(candidate)
    return divergence.compare(llama(4, **SIZES), candidate, inputs_for("llama", tokens=24), **options)


def embedding(model: Any) -> None:
    in_half(model.model.embed_tokens)


def head(model: Any) -> None:
    in_half(model.model.norm)
    in_half(model.lm_head)


def one_gain(model: Any) -> None:
    in_half(model.model.norm)


def third(model: Any) -> None:
    in_half(model.model.layers[2])


def all_layers(model: Any) -> None:
    for layer in model.model.layers:
        in_half(layer)


MIXTURES = {
    "embedding": (embedding, {"embedding"}),
    "head": (head, {"head"}),
    "one gain": (one_gain, {"head"}),
    "third": (third, {"layers.2"}),
    "all layers": (all_layers, {f"layers.{i}" for i in range(4)}),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_is_seen_and_passes(name: str) -> None:
    plant, halves = MIXTURES[name]
    model = llama(4, **SIZES)
    with torch.no_grad():
        plant(model)
    facts = PyTorchProbe(model).run(inputs_for("llama", tokens=24), lambda _: None)
    assert {part for part, precision in facts.mixed.items() if precision == HALF} == halves
    assert {*facts.mixed.values()} == {"bf16", "fp32"}
    result = compared(plant)
    assert result.verdict == "pass", result.reason
    assert result.policy.judged == "introduced"
    assert any("each part is judged by its own precision" in note for note in result.notes)


def gain(index: int) -> Callable[[Any], None]:
    def plant(model: Any) -> None:
        model.model.layers[index].self_attn.v_proj.weight *= 1.005

    return plant


@pytest.mark.parametrize("name", ["embedding", "head", "one gain", "third"])
def test_a_fault_in_fp32_is_found_beside_what_is_half(name: str) -> None:
    """Half a per cent, which bf16 lets pass."""

    def plant(model: Any) -> None:
        gain(1)(model)
        MIXTURES[name][0](model)

    result = compared(plant)
    assert result.verdict == "fail"
    assert result.first_divergence is not None
    assert result.first_divergence.site == "layers.1.value"
    assert [(c.id, c.site) for c in result.causes] == [("weight_scale", "layers.1.value")]
    assert compared(plant, precision="bf16").verdict == "pass", "it was asked to be judged so"


def test_the_same_fault_where_it_is_half_is_within_its_rounding() -> None:
    def plant(model: Any) -> None:
        gain(2)(model)
        third(model)

    assert compared(plant).verdict == "pass"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_the_same_everywhere_is_no_mixture(dtype: torch.dtype) -> None:
    model = llama(3, **SIZES).to(dtype)
    assert PyTorchProbe(model).run(inputs_for("llama"), lambda _: None).mixed == {}


def test_a_norm_in_fp32_that_is_given_halves_rounds_to_halves() -> None:
    """What follows it is in fp32 too, and still no part in fp32."""
    model = llama(3, **SIZES).to(torch.bfloat16)
    model.model.norm.float()
    model.lm_head.float()
    facts = PyTorchProbe(model).run(inputs_for("llama"), lambda _: None)
    assert facts.mixed == {}
    result = divergence.compare(llama(3, **SIZES), model, inputs_for("llama"))
    assert result.verdict == "pass", result.reason


class Autocast(nn.Module):
    """fp32 weights, products in bf16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def test_autocast_is_a_precision() -> None:
    candidate = Autocast(llama(3, **SIZES))
    facts = PyTorchProbe(candidate).run(inputs_for("llama"), lambda _: None)
    assert (facts.precision, facts.mixed) == ("bf16", {})
    result = divergence.compare(
        llama(3, **SIZES), candidate, inputs_for("llama", tokens=24), exclude=["output.*"]
    )
    assert result.verdict == "pass", result.reason
    inner: Any = candidate.model
    inner.model.layers[1].self_attn.v_proj.weight.data *= 1.1
    assert divergence.compare(llama(3, **SIZES), candidate, inputs_for("llama", tokens=24)).verdict == "fail"


@pytest.mark.parametrize(
    ("mixed", "by_part", "said"),
    [
        (
            {"embedding": "bf16", "layers.0": "fp32", "layers.1": "fp32", "head": "fp32"},
            True,
            (
                "the candidate runs in bf16 in embedding, and in fp32 elsewhere: each part is judged by its "
                "own precision"
            ),
        ),
        (
            {
                **{f"layers.{i}": "fp16" for i in range(6)},
                **{f"decoder.layers.{i}": "fp32" for i in range(7)},
            },
            False,
            (
                "the candidate runs in fp16 in layers.0, layers.1, layers.2, layers.3 and 2 more, and in "
                "fp32 elsewhere: all are judged by the coarsest, fp16, for nothing was replayed"
            ),
        ),
    ],
)
def test_the_note_names_what_is_different(mixed: dict[str, str], by_part: bool, said: str) -> None:
    assert mixed_note(mixed, "fp16", by_part=by_part) == said
