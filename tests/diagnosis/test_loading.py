"""What a converter does to weights: embeddings rounded or scaled, norms never loaded, other grids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.diagnosis.faults import diagnosed, planted
from tests.fewer_bits import floats, integers
from tests.models import MODELS, inputs_for, llama

SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_an_embedding_that_alone_is_rounded_is_named(kind: str, dtype: torch.dtype) -> None:
    """Also where positions are added to it, or where it is scaled."""

    def rounded(model: Any) -> None:
        weight = model.get_input_embeddings().weight
        weight.copy_(weight.to(dtype))

    model = MODELS[kind]()
    found = diagnosed(model, planted(model, rounded), inputs_for(kind, tokens=24)).causes[0]
    assert (found.id, found.site) == ("weight_precision", "layers.0.key")
    assert found.title == f"the embedding is rounded to {'bf16' if dtype is torch.bfloat16 else 'fp16'}"
    assert found.explained is not None
    assert found.explained > 0.999


@pytest.mark.parametrize("gain", [8.0, 0.125])
def test_the_gain_of_an_embedding_comes_before_the_epsilon_that_its_norm_shows(gain: float) -> None:
    def scaled(model: Any) -> None:
        model.model.embed_tokens.weight *= gain

    model = llama(3, **SIZES)
    found = diagnosed(model, planted(model, scaled), inputs_for("llama", tokens=24)).causes[0]
    assert (found.id, found.site) == ("weight_scale", "layers.0.key")
    assert found.parameters["gain"] == pytest.approx(gain, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "site"),
    [("input_layernorm", "layers.1.key"), ("post_attention_layernorm", "layers.1.hidden")],
)
def test_a_norm_that_was_never_loaded_is_named(name: str, site: str) -> None:
    model = llama(3, **SIZES)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = getattr(layer, name).weight
            weight.copy_(1 + 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))

    def fresh(made: Any) -> None:
        getattr(made.model.layers[1], name).weight.fill_(1.0)

    found = diagnosed(model, planted(model, fresh), inputs_for("llama", tokens=24)).causes[0]
    assert (found.id, found.site) == ("weights_collapsed", site)
    assert found.title == f"'{name}.weight' is 1 everywhere, as before anything is loaded"


def with_zero_point(weight: Tensor) -> Tensor:
    low, high = float(weight.min()), float(weight.max())
    scale = (high - low) / 255
    return torch.fake_quantize_per_tensor_affine(weight, scale, round(-low / scale), 0, 255)


def in_groups(weight: Tensor) -> Tensor:
    return integers(-1)(weight.unflatten(1, (-1, 32))).flatten(1)


def in_blocks(weight: Tensor) -> Tensor:
    blocks = floats((1, 3))(weight.unflatten(1, (-1, 32)).unflatten(0, (-1, 32)))
    return blocks.flatten(2).flatten(0, 1)


@pytest.mark.parametrize(
    ("change", "cause", "said"),
    [
        (with_zero_point, "quant_int8", "int8 with one step and a zero point for every tensor"),
        (in_groups, "quant_int8", "int8 with one step for every 32 inputs of an output channel"),
        (in_blocks, "quant_fp8", "float8 e4m3 with one scale for every block of 32 by 32"),
    ],
)
def test_other_grids_of_weights_are_named(change: Callable[[Tensor], Tensor], cause: str, said: str) -> None:
    def plant(model: Any) -> None:
        weight = model.model.layers[1].self_attn.v_proj.weight
        weight.copy_(change(weight))

    model = llama(3, **SIZES)
    found = diagnosed(model, planted(model, plant), inputs_for("llama", tokens=24)).causes[0]
    assert (found.id, found.site) == (cause, "layers.1.value")
    assert found.title == f"'self_attn.v_proj.weight' went through {said}"
    assert found.explained is not None
    assert found.explained > 0.999
