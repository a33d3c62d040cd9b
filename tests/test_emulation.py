"""Emulated precision, against what torch itself computes in it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from divergence.emulation import cast, reduced, round_fp8, round_int8, round_tf32
from tests.models import inputs_for, llama


def run(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits without gradients."""
    with torch.inference_mode():
        return model(**inputs).logits  # type: ignore[no-any-return]


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Its layers."""
    return list(model.get_submodule("model.layers").children())


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_is_as_far_off_as_a_model_in_that_dtype(precision: str, dtype: torch.dtype) -> None:
    inputs = inputs_for("llama")
    model = llama()
    exact = run(model, **inputs)
    with reduced(layers_of(model), precision, rest=model):
        emulated = run(model, **inputs)
    native = llama()
    for parameter in native.parameters():
        parameter.data = parameter.data.to(dtype)
    truth = run(native, **inputs).float()
    off = (truth - exact).norm() / exact.norm()
    assert emulated.dtype is dtype
    assert 0.7 < (emulated.float() - exact).norm() / exact.norm() / off < 1.4


def test_float64_agrees_with_a_model_in_float64() -> None:
    inputs, model = inputs_for("llama"), llama()
    with reduced(layers_of(model), "fp64", rest=model):
        emulated = run(model, **inputs)
    native = llama()
    for parameter in native.parameters():
        parameter.data = parameter.data.double()
    assert torch.equal(emulated, run(native, **inputs))


def test_the_model_is_as_before_also_after_an_exception() -> None:
    model, inputs = llama(), inputs_for("llama")
    before = {name: (id(p), p.dtype) for name, p in model.named_parameters()}
    exact = run(model, **inputs)
    with pytest.raises(ZeroDivisionError), reduced(layers_of(model), "fp16", rest=model):
        run(model, **inputs)
        raise ZeroDivisionError
    assert {name: (id(p), p.dtype) for name, p in model.named_parameters()} == before
    assert torch.equal(run(model, **inputs), exact)


def test_buffers_keep_their_precision() -> None:
    """Rounding inv_freq would hide in the floor the very fault that the floor is to find."""
    model = llama()
    seen = []
    rotary = model.get_submodule("model.rotary_emb")
    rotary.register_forward_pre_hook(lambda module, args: seen.append(module.inv_freq.dtype))
    with reduced(layers_of(model), "fp16", rest=model):
        run(model, **inputs_for("llama"))
    assert seen == [torch.float32]


@pytest.mark.parametrize("precision", ["tf32", "fp8", "int8", "bf16-weights"])
def test_precisions_of_products_only_keep_float32_storage(precision: str) -> None:
    model, inputs = llama(), inputs_for("llama")
    exact = run(model, **inputs)
    with reduced(layers_of(model), precision, rest=model):
        emulated = run(model, **inputs)
    assert emulated.dtype is torch.float32
    assert 1e-5 < (emulated - exact).norm() / exact.norm() < 0.5


@given(st.floats(min_value=1e-30, max_value=1e30).map(lambda x: torch.tensor(x).item()))
def test_tf32_keeps_ten_bits_and_is_nearest(value: float) -> None:
    given_value = torch.tensor([value], dtype=torch.float32)
    rounded = round_tf32(given_value)
    assert int(rounded.view(torch.int32).item()) & 0x1FFF == 0
    assert abs(rounded.item() - value) <= abs(value) * 2.0**-11
    assert torch.equal(round_tf32(rounded), rounded)


def test_tf32_ties_go_to_even_and_infinities_stay() -> None:
    one = 0x3F800000
    ties = torch.tensor([one + 0x1000, one + 0x3000], dtype=torch.int32).view(torch.float32)
    assert round_tf32(ties).view(torch.int32).tolist() == [one, one + 0x4000]
    assert round_tf32(torch.tensor([float("inf")])).item() == float("inf")


def test_quantisers_keep_the_largest_value_and_the_grid() -> None:
    value = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    largest = value.abs().amax()
    assert torch.isclose(round_fp8(value).abs().amax(), largest, rtol=1e-6)
    steps = round_int8(value) / (value.abs().amax(-1, keepdim=True) / 127)
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    assert (round_int8(value) - value).abs().max() <= 0.5001 * largest / 127


def test_casting_a_mask_to_fp16_stays_finite_and_keeps_infinities() -> None:
    mask = torch.tensor([0.0, -3.4e38, float("-inf")])
    assert cast((mask, [mask], {"m": mask}), "fp16")[0].tolist() == [0.0, -65504.0, float("-inf")]
    assert cast(mask, "tf32") is mask


def test_an_operator_without_a_kernel_for_fp64_runs_in_fp32() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(2, 16, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ends = torch.tensor([3, 8], dtype=torch.int32)
            return torch.nn.functional.grouped_mm(x, self.weight, offs=ends)

    experts, x = Experts(), torch.randn(8, 16, dtype=torch.float64)
    with torch.inference_mode(), reduced([experts], "fp64"):
        found = experts(x)
    expected = torch.cat((x[:3] @ experts.weight[0].double(), x[3:] @ experts.weight[1].double()))
    assert found.dtype is torch.float64
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_what_fails_for_another_reason_still_fails_in_fp64() -> None:
    class Wrong(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat((x, x[:1, :1]))

    with pytest.raises(RuntimeError, match="Sizes of tensors must match"), reduced([Wrong()], "fp64"):
        Wrong()(torch.zeros(2, 2, dtype=torch.float64))
