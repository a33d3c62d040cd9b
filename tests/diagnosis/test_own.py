"""The candidate's own weights: found under the names that they have there, and what they tell."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import divergence
from divergence.diagnosis import OwnWeights
from divergence.diagnosis.own import is_same
from tests.diagnosis.faults import diagnosed, layer, planted
from tests.exports import exported
from tests.models import MODELS, VOCABULARY, inputs_for, llama

SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
GROUP = 32


class Wrapped(nn.Module):
    """A model within another, which gives its parameters longer names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def static(step: float) -> Callable[[Tensor], Tensor]:
    """Integers of a step that does not follow the weight's range."""
    return lambda w: torch.fake_quantize_per_tensor_affine(w, step, 0, -127, 127)


def percentile(weight: Tensor) -> Tensor:
    """A step for every output channel that leaves the largest hundredth of its values out."""
    steps = torch.quantile(weight.detach().abs(), 0.99, dim=1) / 127
    zeros = torch.zeros(len(steps), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, steps, zeros, 0, -127, 127)


def groups(weight: Tensor) -> Tensor:
    """Seven steps up and down in groups of inputs, which cut off a tenth of the largest value."""
    parts = weight.detach().reshape(-1, GROUP)
    steps = parts.abs().amax(1) * 0.9 / 7
    zeros = torch.zeros(len(steps), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(parts, steps, zeros, 0, -7, 7).reshape(weight.shape)


def saturating(weight: Tensor) -> Tensor:
    """e4m3 with a scale that half of the largest value fits."""
    scale = float(weight.abs().max()) / 2 / 448
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def in_weight(path: str, change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    def plant(model: Any) -> None:
        weight = layer(model, 1).get_submodule(path).weight
        weight.copy_(change(weight))

    return plant


@pytest.mark.parametrize(
    ("change", "cause", "said"),
    [
        (static(0.013), "quant_int8", "int8 with a fixed step for every tensor, 0.013"),
        (percentile, "quant_int8", "int8 with a fixed step for every output channel"),
        (groups, "quant_int8", f"int4 with a fixed step for every {GROUP} inputs of an output channel"),
        (saturating, "quant_fp8", "float8 e4m3 with a fixed scale for every tensor"),
    ],
)
@pytest.mark.parametrize(
    ("path", "site"), [("self_attn.v_proj", "layers.1.value"), ("mlp.down_proj", "layers.1.hidden")]
)
def test_a_weight_of_a_fixed_range_is_named(
    change: Callable[[Tensor], Tensor], cause: str, said: str, path: str, site: str
) -> None:
    model = llama(3, **SIZES)
    result = diagnosed(model, planted(model, in_weight(path, change)), inputs_for("llama", tokens=24))
    (found,) = result.causes
    assert (found.id, found.site) == (cause, site)
    assert found.title.startswith(f"'{path}.weight' went through {said}")
    assert found.explained is not None
    assert found.explained > 0.999
    weight = layer(model, 1).get_submodule(path).weight.detach()
    cut = (change(weight) - weight).abs() > 1.5 * found.parameters["step"]
    assert (found.parameters["beyond"] > 0) is bool(cut.any()) or cause == "quant_fp8"


def test_a_fixed_step_in_every_weight_is_one_fault() -> None:
    def plant(model: Any) -> None:
        for module in layer(model, 1).modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(static(0.011)(module.weight))

    model = llama(3, **SIZES)
    result = diagnosed(model, planted(model, plant), inputs_for("llama", tokens=24))
    assert {cause.id for cause in result.causes} == {"quant_int8"}
    assert result.causes[0].parameters["step"] == pytest.approx(0.011, rel=1e-3)


def noise(weight: Tensor) -> Tensor:
    return weight + 0.02 * weight.std() * torch.randn(
        weight.shape, generator=torch.Generator().manual_seed(5)
    )


def test_weights_of_another_checkpoint_are_said_to_be_others() -> None:
    model = llama(3, **SIZES)
    candidate = planted(model, in_weight("mlp.down_proj", noise))
    result = diagnosed(model, candidate, inputs_for("llama", tokens=24))
    (found,) = result.causes
    assert found.id == "unknown" and found.explained is None
    assert (
        found.title
        == "'mlp.down_proj.weight' is not the reference's (relative L2 0.0195), in no way that is known"
    )
    assert "put into the reference, explains 100 % of the error" in found.evidence[0]
    assert "checkpoint" in found.fix


def test_an_export_shows_its_weights_too(tmp_path: Path) -> None:
    model = llama(3, **SIZES)
    inputs = inputs_for("llama", tokens=24)
    candidate = planted(model, in_weight("self_attn.v_proj", static(0.013)))
    result = diagnosed(model, exported(candidate, inputs, tmp_path / "m.onnx"), inputs)
    assert [(c.id, c.site) for c in result.causes] == [("quant_int8", "layers.1.value")]
    assert result.causes[0].parameters["step"] == pytest.approx(0.013, rel=1e-3)


def cutting(path: str) -> Callable[[Any], None]:
    """A projection whose weight is the reference's and whose results are cut off."""

    def plant(model: Any) -> None:
        projection = layer(model, 1).get_submodule(path)
        forward = projection.forward
        projection.forward = lambda x: forward(x).clamp(-0.5, 0.5)

    return plant


def test_weights_that_are_the_same_are_said_to_be_and_blamed_for_no_part_of_an_error() -> None:
    model = llama(3, **SIZES)

    candidate = planted(model, cutting("self_attn.k_proj"))
    result = diagnosed(model, candidate, inputs_for("llama", tokens=24))
    assert [(c.id, c.site) for c in result.causes] == [("unknown", "layers.1.key")]
    assert any("holds the reference's weights" in line for line in result.causes[0].evidence)


def test_values_that_were_cut_off_are_counted() -> None:
    model = llama(3, **SIZES)

    candidate = planted(model, cutting("self_attn.v_proj"))
    result = diagnosed(model, candidate, inputs_for("llama", tokens=24))
    (found,) = result.causes
    assert found.id == "unknown"
    assert any("values were cut off at -0.5 or 0.5" in line for line in found.evidence)


def test_a_gain_that_the_weight_does_not_hold_is_still_found() -> None:
    """What a forward does with a weight on the way is not in the weight."""
    model = llama(3, **SIZES)

    def scaled(model: Any) -> None:
        projection = layer(model, 1).self_attn.v_proj
        projection.forward = lambda x: nn.functional.linear(x, projection.weight * 1.03)

    result = diagnosed(model, planted(model, scaled), inputs_for("llama", tokens=24))
    (found,) = result.causes
    assert (found.id, found.parameters["gain"]) == ("weight_scale", pytest.approx(1.03, rel=1e-4))


def test_captures_show_no_weights(tmp_path: Path) -> None:
    model = llama(3, **SIZES)
    inputs = inputs_for("llama", tokens=24)
    candidate = planted(model, in_weight("self_attn.v_proj", lambda w: w * 1.02))
    divergence.capture(candidate, inputs, tmp_path / "c")
    result = diagnosed(model, tmp_path / "c", inputs)
    assert [(c.id, c.site) for c in result.causes] == [("weight_scale", "layers.1.value")]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(8), "up": nn.Linear(8, 8)}) for _ in "ab"
        )


def same(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> bool:
    return found.keys() == expected.keys() and all(
        (a is None) is (b is None) and (a is None or b is None or torch.equal(a, b))
        for a, b in ((found[name], expected[name]) for name in found)
    )


def test_names_are_matched_by_their_ends() -> None:
    model = Two()
    parameters = dict(model.named_parameters())

    def found(weights: dict[str, Tensor]) -> dict[str, Tensor | None]:
        own = OwnWeights(model, weights)
        return {name: own.of(parameter) for name, parameter in parameters.items()}

    mine = {name: torch.rand_like(p) for name, p in parameters.items()}
    for prefix in ("", "module.", "a.b."):
        assert same(found({f"{prefix}{name}": tensor for name, tensor in mine.items()}), mine)
    inner = {n.removeprefix("blocks."): t for n, t in mine.items() if n.startswith("blocks.")}
    assert same(found(inner), {n: t if n.startswith("blocks.") else None for n, t in mine.items()})
    twice = {f"{copy}.{name}": tensor for copy in "xy" for name, tensor in mine.items()}
    nothing = dict.fromkeys(mine)
    assert same(found(twice), nothing) and same(found({}), nothing)
    assert same(found({n: torch.rand(3) for n in mine}), nothing)
    assert same(found({n: t.int() for n, t in mine.items()}), nothing)
    assert OwnWeights(model, mine).of(torch.rand(8)) is None


def test_a_weight_is_the_same_in_its_own_precision() -> None:
    weight = MODELS["llama"]().model.layers[0].mlp.up_proj.weight
    assert is_same(weight, copy.deepcopy(weight.detach()))
    assert is_same(weight, weight.detach().bfloat16())
    assert is_same(weight, weight.detach().half())
    assert not is_same(weight, weight.detach().bfloat16().float())
    assert not is_same(weight, weight.detach() * 1.001)


def test_one_kind_of_fault_with_two_parameters_is_two_causes() -> None:
    model = llama(5, **SIZES)

    def plant(model: Any) -> None:
        layer(model, 1).self_attn.v_proj.weight *= 1.5
        layer(model, 3).self_attn.v_proj.weight *= 0.5
        layer(model, 4).self_attn.v_proj.weight *= 1.5

    result = diagnosed(model, planted(model, plant), inputs_for("llama", tokens=24))
    assert [(c.site, round(c.parameters["gain"], 4)) for c in result.causes] == [
        ("layers.1.value", 1.5),
        ("layers.3.value", 0.5),
    ]
    assert result.causes[0].parameters["sites"] == ["layers.1.value", "layers.4.value"]


def test_a_weight_that_would_have_to_be_another_than_it_is_explains_no_part_of_an_error() -> None:
    """Half of the rows negated are half the gain to whoever looks at the error alone."""
    model = llama(3, **SIZES)

    def plant(model: Any) -> None:
        weight = layer(model, 1).mlp.down_proj.weight
        weight[: len(weight) // 3] *= -0.2

    result = diagnosed(model, planted(model, plant), inputs_for("llama", tokens=24))
    (found,) = result.causes
    assert found.id == "unknown"
    assert "'mlp.down_proj.weight' is not the reference's" in found.title


def test_small_values_of_a_float_are_not_taken_for_integers() -> None:
    """All of them are multiples of its smallest step."""
    model = llama(3, **SIZES)

    def small(model: Any) -> None:
        for one in model.model.layers:
            one.self_attn.v_proj.weight *= 0.4 / float(one.self_attn.v_proj.weight.abs().max())

    reference = planted(model, small)

    def unscaled(model: Any) -> None:
        weight = layer(model, 1).self_attn.v_proj.weight
        weight.copy_(weight.to(torch.float8_e4m3fn).float())

    inputs = inputs_for("llama", tokens=24)
    candidate = planted(reference, unscaled).bfloat16()
    (found,) = diagnosed(reference.bfloat16(), candidate, inputs).causes
    assert (found.id, found.site) == ("quant_fp8", "layers.1.value")


@pytest.mark.parametrize("changed", ["attention.query_key_value.weight", "input_layernorm.weight"])
def test_of_two_changes_that_come_to_the_same_the_one_that_was_made_is_named(changed: str) -> None:
    """Nothing but the norm's gain is between the norm and the fused projection, whose bias is zero."""
    config = GPTNeoXConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
    )
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(config).eval()
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.gpt_neox.layers[1].get_parameter(changed).mul_(1.05)
    result = divergence.compare(model, wrong, inputs_for("llama"))
    assert (result.causes[0].id, result.causes[0].parameters["parameter"]) == ("weight_scale", changed)
