"""What happens inside nn.MultiheadAttention is seen, and nothing of it changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from divergence.diagnosis.trace import Interceptor, Trace
from divergence.emulation import _Products
from divergence.pipeline import compare
from divergence.probes.pytorch import PyTorchProbe
from divergence.probes.pytorch.attention import AttentionWatch, Product
from divergence.probes.pytorch.opened import opened
from tests.exports import exported, observed
from tests.multihead import HEADS, TOKENS, WIDTH, Heads, given, spread


@pytest.fixture
def plain() -> Iterator[None]:
    """Without the fused paths, which no torch function mode leaves on."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def projected(attention: Any, read: Tensor, part: int) -> Tensor:
    """Key (1) or value (2) of `read` in float64."""
    if attention.in_proj_weight is None:
        weight = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)[part]
    else:
        weight = attention.in_proj_weight.chunk(3)[part]
    made = read.double() @ weight.double().T + attention.in_proj_bias.chunk(3)[part].double()
    heads: Tensor = made.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    return heads


@pytest.mark.parametrize("memory", [0, WIDTH, 16])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.usefixtures("plain")
def test_keys_and_values_are_sites_and_the_output_keeps_its_bits(
    batch_first: bool, weights: bool, padded: bool, memory: int
) -> None:
    model = Heads(batch_first=batch_first, weights=weights, memory=memory if memory != WIDTH else 0)
    inputs = given(padded=padded, memory=memory)
    with torch.inference_mode():
        before = model(**inputs)
    seen = observed(PyTorchProbe(model), inputs)
    assert torch.equal(next(o.tensor for o in seen.values() if o.site.layer is None), before)
    layer: Any = model.layers[0]
    with torch.inference_mode():
        read = layer.norm(inputs["x"])
        for part, tensor in ((1, "key"), (2, "value")):
            found = seen[f"layers.0.{tensor}"]
            assert found.tensor.shape == (2, HEADS, TOKENS, WIDTH // HEADS)
            wanted = projected(layer.self_attn, read, part)
            torch.testing.assert_close(found.tensor, wanted, check_dtype=False, rtol=1e-5, atol=1e-5)
            assert (f"layers.0.cross_{tensor}" in seen) == bool(memory)
            if memory:
                wanted = projected(layer.cross_attn, inputs["memory"], part)
                found = seen[f"layers.0.cross_{tensor}"]
                torch.testing.assert_close(found.tensor, wanted, check_dtype=False, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_layers_of_pytorch_itself_have_keys_too(batch_first: bool) -> None:
    options: dict[str, Any] = {"batch_first": batch_first, "dim_feedforward": 48}
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, **options)
    encoder = spread(nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first))
    decoder = spread(nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, **options), 2))
    x, memory = (torch.randn(2, n, WIDTH) for n in (5, 9))
    x, memory = (t if batch_first else t.transpose(0, 1) for t in (x, memory))
    seen = observed(PyTorchProbe(encoder), {"src": x})
    assert {"layers.1.key", "layers.1.value"} <= set(seen)
    seen = observed(PyTorchProbe(decoder), {"tgt": x, "memory": memory})
    assert seen["layers.1.key"].tensor.shape == (2, HEADS, 5, WIDTH // HEADS)
    assert seen["layers.1.cross_value"].tensor.shape == (2, HEADS, 9, WIDTH // HEADS)


def test_one_sequence_without_a_batch_has_keys() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, HEADS, 48) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    seen = observed(PyTorchProbe(spread(Alone())), {"x": torch.randn(5, WIDTH)})
    assert seen["layers.1.key"].tensor.shape == (1, HEADS, 5, WIDTH // HEADS)


def test_the_query_is_among_the_details() -> None:
    for weights in (True, False):
        seen = observed(PyTorchProbe(Heads(weights=weights)), given(), detail=True)
        assert seen["layers.2.query"].tensor.shape == (2, HEADS, TOKENS, WIDTH // HEADS)


@pytest.mark.usefixtures("plain")
def test_modes_around_each_other_all_see_what_is_within() -> None:
    model, inputs = Heads(weights=True), given(padded=True)
    products: list[Product] = []
    trace = Trace()
    trace.name_parameters(dict(model.layers[0].named_parameters(prefix="layers.0")))
    with torch.inference_mode():
        before = model(**inputs)
        with AttentionWatch(products.append), _Products("fp32"), Interceptor({}, trace):
            assert torch.equal(model(**inputs), before)
        with AttentionWatch(lambda _: None), _Products("tf32"):
            coarse = model(**inputs)
    assert [p.batch for p in products] == [2, 2, 2]
    assert [o.name for o in trace.operators.values()].count("softmax") == 3
    assert any("layers.0.self_attn.in_proj_weight" in o.parameters for o in trace.operators.values())
    # Only the products inside of attention are left as they were where a mode does not see them.
    assert not torch.equal(coarse, before)


def test_nothing_is_counted_for_the_function_that_was_opened() -> None:
    trace, model = Trace(), Heads()
    with torch.inference_mode(), Interceptor({}, trace):
        model(**given())
    assert "multi_head_attention_forward" not in {o.name for o in trace.operators.values()}


def test_a_class_of_tensors_keeps_its_own_function() -> None:
    class Own(Tensor):
        pass

    func, args = functional.multi_head_attention_forward, (torch.zeros(3, 2, WIDTH),)
    assert opened(func, (Tensor,), args, None) is not None
    assert opened(func, (Tensor, Own), args, None) is None
    assert opened(functional.linear, (), args, None) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("memory", [0, 16])
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_an_export_shows_the_same_keys(batch_first: bool, weights: bool, memory: int, tmp_path: Path) -> None:
    model = Heads(batch_first=batch_first, weights=weights, memory=memory)
    inputs = given(padded=True, memory=memory)
    result = compare(model, exported(model, inputs, tmp_path / "m.onnx"), inputs)
    assert result.verdict == "pass", result.reason
    names = ("key", "value", *(("cross_key", "cross_value") if memory else ()))
    assert {f"layers.{i}.{name}" for i in range(3) for name in names} <= {s.site for s in result.sites}
