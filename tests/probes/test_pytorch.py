"""The PyTorch probe, against tensors recorded by other means."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from divergence.errors import InputError, SourceError
from divergence.probes import Observation
from divergence.probes.pytorch import PyTorchProbe, own_keys
from divergence.probes.pytorch.attention import unrepeat
from divergence.probes.pytorch.observer import LayerObserver
from divergence.probes.pytorch.stacks import find_stacks
from tests.models import MODELS, inputs_for, llama

LAYERS = {"t5": 4, "whisper": 4}


def observed(model: Any, inputs: dict[str, Tensor], **options: Any) -> dict[str, Observation]:
    """Every observation of a run by site, tensors copied."""
    seen: dict[str, Observation] = {}

    def keep(o: Observation) -> None:
        seen[str(o.site)] = Observation(o.site, o.tensor.clone(), o.axes, o.found)

    PyTorchProbe(model).run(inputs, keep, **options)
    return seen


def flat(output: Any) -> list[Tensor]:
    """Tensors of a model's output that are plain leaves."""
    values = output.values() if hasattr(output, "values") else [output]
    return [v for v in values if isinstance(v, Tensor)]


@pytest.mark.parametrize("kind", MODELS)
def test_every_layer_has_key_value_hidden_and_the_output_keeps_its_bits(kind: str) -> None:
    model, inputs = MODELS[kind](), inputs_for(kind)
    with torch.inference_mode():
        before = flat(model(**inputs))
    seen = observed(model, inputs)
    with torch.inference_mode():
        after = flat(model(**inputs))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for tensor in ("key", "value", "hidden"):
        assert sum(o.site.tensor == tensor for o in seen.values()) == LAYERS.get(kind, 3), tensor
    own = [o.tensor for o in seen.values() if o.site.layer is None]
    assert all(torch.equal(a, b) for a, b in zip(before, own, strict=True))
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("kind", ["llama", "llama-eager", "gemma2", "qwen3", "gpt2", "opt"])
def test_keys_and_values_are_what_the_cache_holds(kind: str) -> None:
    model, inputs = MODELS[kind](), inputs_for(kind)
    with torch.inference_mode():
        cache = model(**inputs).past_key_values
    seen = observed(model, inputs)
    for layer in range(3):
        assert torch.equal(seen[f"layers.{layer}.key"].tensor, cache.layers[layer].keys)
        assert torch.equal(seen[f"layers.{layer}.value"].tensor, cache.layers[layer].values)


def test_without_a_cache_the_repeated_heads_are_undone() -> None:
    cached, uncached = (
        observed(MODELS["llama"](), inputs_for("llama")),
        observed(MODELS["llama-uncached"](), inputs_for("llama")),
    )
    for layer in range(3):
        one, other = cached[f"layers.{layer}.key"], uncached[f"layers.{layer}.key"]
        assert torch.equal(one.tensor, other.tensor)
        assert one.found == "cache" and "scaled_dot_product" in other.found


def test_cross_attention_has_sites_of_its_own() -> None:
    seen = observed(MODELS["whisper"](), inputs_for("whisper"))
    assert seen["decoder.layers.1.cross_key"].tensor.shape == (2, 4, 10, 8)
    assert seen["decoder.layers.1.key"].tensor.shape == (2, 4, 5, 8)
    assert seen["encoder.layers.0.key"].tensor.shape == (2, 4, 10, 8)


def test_hidden_states_are_those_of_the_model_itself() -> None:
    model, inputs = MODELS["llama"](), inputs_for("llama")
    with torch.inference_mode():
        states = model(**inputs, output_hidden_states=True).hidden_states
    seen = observed(model, inputs)
    # transformers lists the embedding first and the last layer after the final norm.
    for layer in range(2):
        assert torch.equal(seen[f"layers.{layer}.hidden"].tensor, states[layer + 1])


def test_detail_adds_the_submodules() -> None:
    seen = observed(MODELS["llama"](), inputs_for("llama"), detail=True)
    for tensor in ("input_norm", "query", "attention", "post_norm", "mlp"):
        assert f"layers.2.{tensor}" in seen


def test_a_layer_called_again_is_another_site() -> None:
    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()

        def forward(self, input_ids: Tensor) -> Any:
            first = self.inner(input_ids=input_ids[:, :4], use_cache=True)
            second = self.inner(input_ids=input_ids[:, 4:], past_key_values=first.past_key_values)
            return second.logits

    inputs = {"input_ids": inputs_for("llama")["input_ids"]}
    seen = observed(Unrolled(), inputs)
    assert seen["layers.1.key"].tensor.shape[2] == 4
    assert seen["layers.1.key@2"].tensor.shape[2] == 9
    assert seen["layers.1.hidden@2"].tensor.shape[1] == 5


class OwnKeys(nn.Module):
    """Returns its keys before a rotation that attention applies to them."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = self.qkv(x).unflatten(-1, (6, 4)).transpose(1, 2).chunk(3, 1)
            mixed = nn.functional.scaled_dot_product_attention(q, k.roll(1, -1), v)
            return x + self.out(mixed.transpose(1, 2).flatten(2)), k, v

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        keys, values = [], []
        for block in self.blocks:
            x, k, v = block(x)
            keys.append(k)
            values.append(v)
        return {"keys": torch.stack(keys, 1), "values": torch.stack(values, 1), "last": x}


def test_keys_that_the_model_returns_take_precedence() -> None:
    model, inputs = OwnKeys().eval(), {"x": torch.randn(2, 5, 8)}
    with torch.inference_mode():
        keys = model(**inputs)["keys"]
    seen = observed(model, inputs)
    for layer in range(3):
        assert torch.equal(seen[f"layers.{layer}.key"].tensor, keys[:, layer])
        assert "model output 'keys'" in seen[f"layers.{layer}.key"].found
        assert "scaled_dot_product" in seen[f"layers.{layer}.value"].found


def test_everything_is_removed_after_an_exception() -> None:
    model = llama()

    def fail(*args: Any) -> None:
        raise RuntimeError("planted")

    handle = model.get_submodule("model.layers.1.mlp").register_forward_hook(fail)
    with pytest.raises(
        SourceError, match=r"the model raised RuntimeError: planted on inputs input_ids int64\[2, 9\]"
    ):
        observed(model, inputs_for("llama"))
    handle.remove()
    assert not any("forward" in vars(m) for m in model.modules())
    gc.collect()
    assert observed(model, inputs_for("llama"))


def test_training_mode_is_given_back() -> None:
    model = llama().train()
    model.get_submodule("model.layers.0.mlp").eval()
    observed(model, inputs_for("llama"))
    assert model.training and not model.get_submodule("model.layers.0.mlp").training


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(SourceError, match="no layer stack"):
        PyTorchProbe(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(SourceError, match=r"returned dict, not a torch\.nn\.Module"):
        PyTorchProbe({})  # type: ignore[arg-type]


def test_layers_that_are_never_called_are_refused() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers: Any = nn.ModuleList(OwnKeys.Layer() for _ in range(2))

        def forward(self, x: Tensor) -> Any:
            return self.layers[0].out(x)

    with pytest.raises(SourceError, match="never called"):
        observed(Aside(), {"x": torch.randn(1, 2, 8)})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"inputs_ids": torch.zeros(1, 2, dtype=torch.int64)}, "did you mean 'input_ids'"),
        ({"x": torch.zeros(1, 2)}, "no input 'x'; it takes input_ids"),
    ],
)
def test_wrong_input_names_are_refused(inputs: dict[str, Tensor], message: str) -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()

        def forward(self, input_ids: Tensor) -> Any:
            return self.inner(input_ids=input_ids).logits

    with pytest.raises(InputError, match=message):
        observed(Strict(), inputs)


def test_a_missing_input_is_named() -> None:
    with pytest.raises(InputError, match="needs input 'x', and the inputs have only nothing"):
        observed(OwnKeys(), {})


def test_stacks_are_found_by_structure_and_named_apart() -> None:
    assert [s.path for s in find_stacks(llama())] == ["model.layers"]
    whisper = find_stacks(MODELS["whisper"]())
    assert [(s.name, len(s.layers)) for s in whisper] == [("encoder", 2), ("decoder", 2)]

    class Numbered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block_0, self.block_1, self.head = OwnKeys.Layer(), OwnKeys.Layer(), nn.Linear(8, 8)

    assert [(s.path, len(s.layers)) for s in find_stacks(Numbered())] == [("block", 2)]


def test_blocks_that_hold_their_weights_themselves_are_layers() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into = nn.Parameter(torch.randn(8, 16))
            self.back = nn.Parameter(torch.randn(16, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x + (x @ self.into).relu() @ self.back

    class Own(nn.Module):
        def __init__(self, kind: Callable[[], nn.Module]) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(kind() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    seen = observed(Own(Block), {"x": torch.randn(1, 4, 8)})
    assert [site for site in seen if "hidden" in site] == [f"layers.{i}.hidden" for i in range(3)]
    assert not find_stacks(Own(lambda: nn.Linear(8, 8)))
    assert not find_stacks(Own(lambda: nn.GRUCell(8, 8)))


@pytest.mark.parametrize("group", [1, 2, 3, 6])
def test_unrepeat_inverts_repeat_interleave(group: int) -> None:
    kept = torch.randn(2, 6 // group, 5, 4)
    kept[0, 0, 0, 0] = float("nan")
    found, by = unrepeat(kept.repeat_interleave(group, 1))
    assert by == group
    assert torch.equal(found.nan_to_num(), kept.nan_to_num())


def test_the_digest_tells_weights_apart() -> None:
    model, inputs = llama(), inputs_for("llama")
    first = PyTorchProbe(model).run(inputs, lambda o: None).model_digest
    assert PyTorchProbe(model).run(inputs, lambda o: None).model_digest == first
    with torch.no_grad():
        weight = model.get_submodule("model.layers.1.mlp.up_proj").weight
        weight[0], weight[1] = weight[1].clone(), weight[0].clone()
    assert PyTorchProbe(model).run(inputs, lambda o: None).model_digest != first


def test_a_module_that_would_act_otherwise_in_training_is_told_of() -> None:
    class Dropping(nn.Module):
        def __init__(self, share: float) -> None:
            super().__init__()
            self.model = llama(2)
            self.drop = nn.Dropout(share)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            logits: Tensor = self.drop(self.model(input_ids=input_ids, attention_mask=attention_mask).logits)
            return logits

    def notes(model: nn.Module) -> tuple[str, ...]:
        return PyTorchProbe(model).run(inputs_for("llama"), lambda _: None).notes

    assert notes(Dropping(0.1).train()) == (
        "pytorch: in training mode (Dropout); it was run in evaluation mode",
    )
    assert notes(Dropping(0.1).eval()) == notes(Dropping(0.0).train()) == ()


def test_a_probe_that_has_run_holds_no_tensor_of_the_run() -> None:
    """At once: cycles are collected late, and a device's memory is not Python's."""
    seen: dict[str, weakref.ref[Tensor]] = {}
    probe = PyTorchProbe(llama(3))
    gc.disable()
    try:
        probe.run(inputs_for("llama"), lambda made: seen.update({str(made.site): weakref.ref(made.tensor)}))
        left = [site for site, ref in seen.items() if ref() is not None]
        watching = [held for held in gc.get_objects() if type(held) in (LayerObserver, own_keys.OwnKeys)]
    finally:
        gc.enable()
    assert len(seen) == 10
    assert left == watching == []
