"""Replay gives a layer what the candidate gives it, and does not judge by one that it cannot run again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from divergence.probes import silent
from divergence.probes.pytorch import PyTorchProbe
from tests.test_pipeline import judged, stored

HIDDEN = 32
RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 64, "state_size": 8},
    "falcon_h1": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "vocab_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
    },
}


class Block(nn.Module):
    """A residual layer that attends to `memory` if there is any."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(HIDDEN, 4, batch_first=True)
        self.norm = nn.LayerNorm(HIDDEN)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN))

    def forward(self, memory: Tensor, hidden: Tensor) -> Tensor:
        read = self.norm(memory).to(hidden.dtype)
        hidden = hidden + self.attention(self.norm(hidden), read, read, need_weights=False)[0]
        result: Tensor = hidden + self.mlp(self.norm(hidden))
        return result


class Reader(nn.Module):
    """A decoder that attends to the last layer of an encoder, which is its first argument; `skip` hands the
    first layer of the encoder to the last one as well."""

    def __init__(self, depth: int = 12, *, amplified: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder = nn.ModuleList(Block() for _ in range(depth))
        self.decoder = nn.ModuleList(Block() for _ in range(4))
        with torch.no_grad():
            for block in self.encoder:
                block.get_parameter("mlp.2.weight").mul_(amplified)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = (t.to(self.decoder[0].get_parameter("norm.weight").dtype) for t in (x, y))
        for block in self.encoder:
            x = block(x, x)
        for block in self.decoder:
            y = block(x, y)
        return y


def given() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(2, tokens, HIDDEN, generator=generator) for name, tokens in (("x", 24), ("y", 16))
    }


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_a_decoder_attends_to_is_the_candidates(precision: str) -> None:
    model = Reader(amplified=5.0)  # the encoder's own error is far beyond a decoder layer's floor
    result = judged(model, stored(model, precision), given())
    assert result.verdict == "pass", result.reason
    site = result.site("decoder.layers.0.hidden")
    assert site.introduced is not None and site.rel_l2 is not None
    assert site.introduced_ratio is not None and site.introduced_ratio < 2


def test_an_error_of_the_encoder_is_no_error_of_the_decoder() -> None:
    model = Reader()
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.encoder[5].get_parameter("mlp.0.weight").mul_(1.05)
    result = judged(model, wrong, given())
    assert [s.site for s in result.sites if s.verdict == "fail" and s.layer is not None] == [
        "encoder.layers.5.hidden"
    ]
    assert [cause.id for cause in result.causes] == ["weight_scale"]


def test_the_memory_is_not_taken_for_the_hidden_input() -> None:
    probe = PyTorchProbe(Reader(2))
    probe.run(given(), lambda _: None, progress=silent, record=True)
    assert {call.hidden_at for call in probe.calls if call.stack == "decoder"} == {1}


def test_a_deep_t5_in_half_precision_passes() -> None:
    config = T5Config(
        vocab_size=61, d_model=48, d_kv=12, num_layers=10, num_decoder_layers=3, num_heads=4, d_ff=96
    )
    torch.manual_seed(0)
    model: Any = T5ForConditionalGeneration(config).eval()
    ids = torch.arange(48).reshape(2, 24) % 61
    result = judged(model, stored(model, "bf16"), {"input_ids": ids, "decoder_input_ids": ids[:, :10]})
    assert result.verdict == "pass", result.reason
    assert all(s.introduced_ratio is None or s.introduced_ratio < 2 for s in result.sites)


class Plain(nn.Module):
    """A layer."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.calls = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        added: Tensor = self.block(hidden, hidden)
        return hidden + self.share() * added

    def share(self) -> float:
        return 1.0


class Counting(Plain):
    """A layer whose answer depends on how often it was called since the model began."""

    def share(self) -> float:
        return 1.0 / self.calls


class Stateful(nn.Module):
    """Four layers of which the second counts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Counting() if index == 1 else Plain() for index in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.layers[0].get_parameter("block.norm.weight").dtype)
        for layer in self.layers:
            assert isinstance(layer, Plain)
            layer.calls = 0
        for layer in self.layers:
            x = layer(x)
        return x


class States:
    """A cache whose states are written in place; the first write of a layer replaces what is there."""

    def __init__(self, kept: object) -> None:
        self.kept = kept
        self.written: dict[int, bool] = {}

    def update(self, hidden: Tensor, layer: int) -> Tensor:
        mean = hidden.mean(1, keepdim=True)
        state = self.kept[layer]  # type: ignore[index]
        if self.written.get(layer):
            mean = mean + state
        self.written[layer] = True
        state.copy_(mean)
        return mean


class Held:
    """The same for one layer."""

    def __init__(self) -> None:
        self.states = {0: torch.zeros(2, 1, HIDDEN)}

    def __add__(self, other: Tensor) -> Tensor:
        return self.states[0] + other

    __radd__ = __add__

    def copy_(self, other: Tensor) -> None:
        self.states[0].copy_(other)


class Recurrent(nn.Module):
    """Layers that add a running state to what they are given."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.layers = nn.ModuleList(Recurring(index) for index in range(3))

    def forward(self, x: Tensor) -> Tensor:
        def fresh() -> Tensor:
            return torch.zeros(2, 1, HIDDEN, dtype=x.dtype)

        states: object = [fresh() for _ in self.layers]
        if self.kind == "cache of tensors":
            states = States(states)
        elif self.kind == "cache by number":
            states = States({index: fresh() for index in range(3)})
        elif self.kind == "cache of layers":
            states = States([Held() for _ in self.layers])
        for layer in self.layers:
            x = layer(x, states)
        return x


class Recurring(Plain):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, hidden: Tensor, states: Any = None) -> Tensor:
        if isinstance(states, States):
            mean = states.update(hidden, self.index)
        else:
            mean = states[self.index] + hidden.mean(1, keepdim=True)
            states[self.index].copy_(mean)
        return super().forward(hidden) + mean


@pytest.mark.parametrize("kind", ["list", "cache of tensors", "cache by number", "cache of layers"])
def test_layers_that_write_into_states_in_place_are_run_again(kind: str) -> None:
    model, inputs = Recurrent(kind), {"x": given()["x"]}
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.layers[1].get_parameter("block.mlp.2.weight").mul_(1.5)
    result = judged(model, wrong, inputs)
    assert not [note for note in result.notes if "run again" in note]
    assert [s.site for s in result.sites if s.verdict == "fail"] == ["layers.1.hidden"]
    assert result.causes[0].id == "weight_scale", result.causes
    assert "block.mlp.2.weight" in result.causes[0].title


@pytest.mark.parametrize("kind", ["mamba", "falcon_h1"])
def test_layers_with_states_of_transformers_are_run_again(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **RECURRENT[kind])).eval()
    wrong = copy.deepcopy(model)
    name = "mixer.in_proj.weight" if kind == "mamba" else "mamba.in_proj.weight"
    layers = next(module for module in wrong.modules() if isinstance(module, nn.ModuleList))
    with torch.no_grad():
        layers[1].get_parameter(name).mul_(1.05)
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    result = judged(model, wrong, {"input_ids": ids})
    assert not [note for note in result.notes if "run again" in note]
    assert [s.site for s in result.sites if s.verdict == "fail"] == ["layers.1.hidden"]
    assert (result.causes[0].id, name in result.causes[0].title) == ("weight_scale", True)


def test_a_layer_that_cannot_be_run_again_is_judged_cumulatively() -> None:
    model, inputs = Stateful(), {"x": given()["x"]}
    result = judged(model, stored(model, "fp16"), inputs, replay="always")
    assert result.verdict == "pass", result.reason
    (note,) = [note for note in result.notes if "run again" in note]
    assert note.startswith("layers.1: ")
    replayed = {s.layer: s.introduced is not None for s in result.sites if s.layer is not None}
    assert replayed == {0: True, 1: False, 2: True, 3: True}


@pytest.mark.parametrize("layer", [1, 3])
def test_a_fault_beside_or_in_such_a_layer_is_found(layer: int) -> None:
    model = Stateful()
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.layers[layer].get_parameter("block.mlp.2.weight").mul_(1.5)
    result = judged(model, stored(wrong, "fp16"), {"x": given()["x"]})
    assert result.first_divergence is not None
    assert result.first_divergence.site == f"layers.{layer}.hidden"
