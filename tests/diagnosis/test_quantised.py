"""Caches, products and weights of few bits: the format, what shares a step, and where, are named."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import divergence
from divergence.diagnosis import quantised
from tests.diagnosis.faults import case_of, diagnosed, planted
from tests.fewer_bits import Change, floats, integers, round_products
from tests.models import inputs_for, llama

SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}


def dynamic(tensor: Tensor) -> Tensor:
    """By torch's own observer of a range that holds zero."""
    low, high = (float(x) for x in (tensor.min().clamp(max=0), tensor.max().clamp(min=0)))
    scale = (high - low) / 255
    return torch.fake_quantize_per_tensor_affine(tensor, scale, round(-low / scale), 0, 255)


def unscaled(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float8_e4m3fn).to(tensor.dtype)


class Rounding(DynamicCache):
    """A cache that holds what `change` makes of keys and values."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return super().update(self.change(key_states), self.change(value_states), layer_idx, *args, **kwargs)


class Cached(nn.Module):
    """A model whose attention reads keys and values from such a cache."""

    def __init__(self, model: nn.Module, change: Change = lambda t: t) -> None:
        super().__init__()
        self.model = model
        self.change = change

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=Rounding(self.change),
            use_cache=True,
        ).logits
        return logits


@pytest.mark.parametrize(
    ("change", "cause", "said"),
    [
        (unscaled, "quant_fp8", "float8 e4m3 without a scale"),
        (floats((0, 1, 2, 3)), "quant_fp8", "float8 e4m3 with one step for every tensor"),
        (floats((0, 1, 2, 3), torch.float8_e5m2), "quant_fp8", "float8 e5m2 with one step for every tensor"),
        (floats(3), "quant_fp8", "float8 e4m3 with one step for every token of a head"),
        (integers((0, 1, 2, 3)), "quant_int8", "int8 with one step for every tensor"),
        (integers((0, 2, 3)), "quant_int8", "int8 with one step for every head"),
        (integers((1, 3)), "quant_int8", "int8 with one step for every token"),
        (integers(2), "quant_int8", "int8 with one step for every channel of a head"),
        (integers(3, 7), "quant_int8", "int4 with one step for every token of a head"),
    ],
)
def test_a_cache_of_few_bits_is_named(change: Change, cause: str, said: str) -> None:
    result = diagnosed(
        Cached(llama(3, **SIZES)), Cached(llama(3, **SIZES), change), inputs_for("llama", tokens=24)
    )
    assert result.first_divergence is not None
    assert result.first_divergence.site == "layers.0.key"
    (found,) = result.causes
    assert (found.id, found.site) == (cause, "layers.0.key")
    assert found.title == f"keys and values go through {said}, and attention reads them so"
    assert found.explained is not None
    assert found.explained > 0.999


def fixed(step: float, low: int = -128, high: int = 127) -> Change:
    return lambda tensor: torch.fake_quantize_per_tensor_affine(tensor, step, 0, low, high)


def fixed_float(scale: float) -> Change:
    return lambda tensor: (tensor / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(tensor.dtype) * scale


@pytest.mark.parametrize(
    ("change", "cause", "said", "step", "cuts"),
    [
        (fixed(0.05), "quant_int8", "int8 with a step of 0.05", 0.05, False),
        (fixed(0.01), "quant_int8", "int8 with a step of 0.01", 0.01, True),
        (fixed(0.013, -100, 155), "quant_int8", "int8 with a step of 0.013", 0.013, True),
        (fixed_float(0.1), "quant_fp8", "float8 e4m3 with a scale of", None, False),
        (fixed_float(0.002), "quant_fp8", "float8 e4m3 with a scale of 0.002", 0.002, True),
    ],
)
def test_a_cache_of_a_fixed_range_is_named_with_its_step(
    change: Change, cause: str, said: str, step: float | None, cuts: bool
) -> None:
    result = diagnosed(
        Cached(llama(3, **SIZES)), Cached(llama(3, **SIZES), change), inputs_for("llama", tokens=24)
    )
    (found,) = result.causes
    assert (found.id, found.site) == (cause, "layers.0.key")
    assert found.title.startswith(f"keys and values went through {said}")
    assert ("cut off" in found.title) is cuts is (found.parameters["beyond"] > 0)
    assert step is None or found.parameters["step"] == pytest.approx(step, rel=1e-3)
    assert found.explained is not None
    assert found.explained > 0.999


class HandsOut(nn.Module):
    """A model that returns its keys and values, rounded where attention has read them already."""

    def __init__(self, model: nn.Module, change: Change = lambda t: t) -> None:
        super().__init__()
        self.model = model
        self.change = change

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        made = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=True)
        layers = made.past_key_values.layers
        held = {
            f"present.{i}.{n}": getattr(x, f"{n}s") for i, x in enumerate(layers) for n in ("key", "value")
        }
        return {"logits": made.logits, **{name: self.change(tensor) for name, tensor in held.items()}}


def test_a_cache_that_is_rounded_where_it_is_handed_out_is_told_from_one_that_is_read() -> None:
    reference, candidate = HandsOut(llama(3, **SIZES)), HandsOut(llama(3, **SIZES), integers(3))
    result = diagnosed(reference, candidate, inputs_for("llama", tokens=24))
    assert "layers.0.hidden" not in {site.site for site in result.sites if site.verdict == "fail"}
    assert result.causes[0].title == (
        "keys and values go through int8 with one step for every token of a head where they are handed out"
    )


def products(inputs: Change, weights: Change, only: str = "layers.") -> Callable[[Any], None]:
    """Plants products of rounded inputs and weights."""

    def plant(model: Any) -> None:
        for name, module in model.named_modules():
            if only in name:
                round_products(module, inputs, weights)

    return plant


CHANNEL, TENSOR, TOKEN = (
    "with one step for every output channel",
    "with one step for every tensor",
    "with one step for every token",
)

ZERO_POINT = "with one step and a zero point for every tensor"


def whole(make: Callable[..., Change]) -> Change:
    return lambda tensor: make(tuple(range(tensor.dim())))(tensor)


@pytest.mark.parametrize(
    ("plant", "cause", "site", "said"),
    [
        (
            products(whole(integers), integers(1)),
            "quant_int8",
            "layers.0.key",
            f"every projection ran in int8: weights {CHANNEL}, inputs {TENSOR}",
        ),
        (
            products(integers(-1), integers(1)),
            "quant_int8",
            "layers.0.key",
            f"every projection ran in int8: weights {CHANNEL}, inputs {TOKEN}",
        ),
        (
            products(dynamic, whole(integers)),
            "quant_int8",
            "layers.0.key",
            f"every projection ran in int8: weights {TENSOR}, inputs {ZERO_POINT}",
        ),
        (
            products(whole(floats), whole(floats)),
            "quant_fp8",
            "layers.0.key",
            f"every projection ran in float8 e4m3: weights {TENSOR}, inputs {TENSOR}",
        ),
        (
            products(floats(-1), floats(1)),
            "quant_fp8",
            "layers.0.key",
            f"every projection ran in float8 e4m3: weights {CHANNEL}, inputs {TOKEN}",
        ),
        (
            products(unscaled, whole(floats)),
            "quant_fp8",
            "layers.0.key",
            f"every projection ran in float8 e4m3: weights {TENSOR}, inputs without a scale",
        ),
        (
            products(whole(integers), lambda w: w),
            "quant_int8",
            "layers.0.key",
            f"every projection ran in int8: weights as they are, inputs {TENSOR}",
        ),
        (
            products(whole(integers), integers(1), "mlp"),
            "quant_int8",
            "layers.0.hidden",
            f"every projection of the MLP ran in int8: weights {CHANNEL}, inputs {TENSOR}",
        ),
        (
            products(integers(-1), integers(1), "layers.2.mlp.down_proj"),
            "quant_int8",
            "layers.2.hidden",
            f"the product with 'mlp.down_proj.weight' ran in int8: weights {CHANNEL}, inputs {TOKEN}",
        ),
    ],
)
def test_products_of_few_bits_are_named(
    plant: Callable[[Any], None], cause: str, site: str, said: str
) -> None:
    model = llama(4, **SIZES)
    result = diagnosed(model, planted(model, plant), inputs_for("llama", tokens=24))
    assert result.first_divergence is not None
    assert result.first_divergence.site == site
    (found,) = result.causes
    assert (found.id, found.site, found.title) == (cause, site, said)
    assert found.explained is not None
    assert found.explained > 0.999


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("size", [32, 64])
def test_weights_of_four_bits_are_named(size: int, zero_point: bool) -> None:
    def rounded(weight: Tensor) -> Tensor:
        groups = weight.unflatten(1, (-1, size))
        if not zero_point:
            return integers(-1, 7)(groups).flatten(1)
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        step = (high - low) / 15
        zero = (-low / step).round()
        steps: Tensor = ((groups / step).round() + zero).clamp(0, 15) - zero
        made: Tensor = (steps * step).flatten(1)
        return made

    model = llama(4, **SIZES)
    plant = products(lambda x: x, rounded, "layers.1.self_attn.v_proj")
    (found,) = diagnosed(model, planted(model, plant), inputs_for("llama", tokens=24)).causes
    grain = "output channel" if size == 64 else "32 inputs of an output channel"  # of 64 inputs in all
    how = " and a zero point" if zero_point else ""
    assert found.title == f"'self_attn.v_proj.weight' went through int4 with one step{how} for every {grain}"
    assert (found.id, found.site, found.parameters["bits"]) == ("quant_int8", "layers.1.value", 4)


@pytest.mark.slow
@pytest.mark.parametrize("per_channel", [False, True])
def test_what_onnxruntime_quantises_is_named_to_the_last_digits(tmp_path: Path, per_channel: bool) -> None:
    """Its embedding too, which enters before the first site."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = llama(3, **SIZES, use_cache=False, attn_implementation="eager")
    inputs = inputs_for("llama", tokens=24)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(model, kwargs=dict(inputs), dynamo=True)
        program.save(tmp_path / "model.onnx")
        quantize_dynamic(
            tmp_path / "model.onnx",
            tmp_path / "small.onnx",
            per_channel=per_channel,
            weight_type=QuantType.QInt8,
        )
    result = diagnosed(model, tmp_path / "small.onnx", inputs, precision="fp32")
    found = result.causes[0]
    assert (found.id, found.site) == ("quant_int8", "layers.0.key")
    assert found.title == (
        "the embedding went through int8 with one step and a zero point; every projection ran in int8: "
        f"weights {CHANNEL if per_channel else TENSOR}, inputs {ZERO_POINT}"
    )
    assert found.explained is not None
    assert found.explained > 0.9999


@pytest.mark.parametrize("axes", [(0, 1), (0,), (1,)])
def test_rounding_is_torchs_own(axes: tuple[int, ...]) -> None:
    tensor = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    step = tensor.abs().amax(axes, keepdim=True) / 127
    rows = tensor.T if axes == (0,) else tensor
    steps = step.expand(6, 1).flatten() if axes == (0, 1) else step.flatten()
    zeros = torch.zeros(len(rows), dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(rows.contiguous(), steps, zeros, 0, -127, 127)
    found = quantised.integers(8)(tensor, axes, None)
    torch.testing.assert_close(found, expected.T if axes == (0,) else expected)
    torch.testing.assert_close(quantised.shifted(8)(tensor, (0, 1), None), dynamic(tensor))


def test_emulations_change_nothing_where_the_fault_is_there_already() -> None:
    """What lies on the grid stays where it is: a second rounding adds no more than rounding of fp32."""
    tensor = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    formats = (quantised.integers(8), quantised.integers(4), quantised.shifted(8), quantised.shifted(4))
    for rounded in formats:
        for _, axes in quantised.OF_A_CACHE:
            once = rounded(tensor, axes, None)
            torch.testing.assert_close(rounded(once, axes, None), once)


def test_noise_of_no_grid_stays_unknown() -> None:
    def noise(model: Any) -> None:
        weight = model.model.layers[1].self_attn.v_proj.weight
        weight += 0.01 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))

    model = llama(3, **SIZES)
    result = diagnosed(model, planted(model, noise), inputs_for("llama", tokens=24))
    assert [(c.id, c.site) for c in result.causes] == [("unknown", "layers.1.value")]


def test_an_error_that_follows_the_tensor_is_no_rounding() -> None:
    model = llama(3, **SIZES)

    def gain(model: Any) -> None:
        model.model.layers[1].self_attn.v_proj.weight *= 1.02

    case = case_of(model, planted(model, gain), inputs_for("llama", tokens=24))
    assert not quantised.is_possible(case)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16")])
@pytest.mark.parametrize("shown", [False, True])
def test_attention_that_runs_in_half_precision_as_a_whole_is_named(
    implementation: str, dtype: torch.dtype, name: str, shown: bool
) -> None:
    """At its keys, where no cache shows them as they were before."""

    def halved(model: Any) -> None:
        from transformers import AttentionInterface

        def attend(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any
        ) -> Any:
            query, key, value = (t.to(dtype) for t in (query, key, value))
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
            seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
            scores = (query @ key.transpose(-1, -2) * kwargs["scaling"]).masked_fill(~seen, -torch.inf)
            return (scores.softmax(-1) @ value).transpose(1, 2).float(), None

        AttentionInterface.register("halved", attend)
        model.config._attn_implementation = "halved"

    model = llama(3, **SIZES, attn_implementation=implementation, use_cache=not shown)
    inputs = {"input_ids": inputs_for("llama", tokens=24)["input_ids"]}
    found = diagnosed(model, planted(model, halved), inputs, precision="fp32").causes[0]
    assert (found.id, found.site) == ("softmax_precision", f"layers.0.{'key' if shown else 'hidden'}")
    assert found.title.startswith(f"all of the attention runs in {name}: queries, keys, values, scores")
    assert found.explained is not None
    assert found.explained > 0.99


def test_four_bits_for_a_whole_tensor_are_named_from_a_capture(tmp_path: Path) -> None:
    """Which shows no weights."""
    model = llama(3, **SIZES)
    inputs = inputs_for("llama", tokens=24)

    def plant(model: Any) -> None:
        weight = model.model.layers[1].self_attn.v_proj.weight
        weight.copy_(integers((0, 1), 7)(weight))

    divergence.capture(planted(model, plant), inputs, tmp_path / "c")
    (found,) = diagnosed(model, tmp_path / "c", inputs).causes
    assert (found.id, found.site) == ("quant_int8", "layers.1.value")
    assert found.title == "'self_attn.v_proj.weight' went through int4 with one step for every tensor"
