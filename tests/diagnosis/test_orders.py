"""What stands in another order is named, and which order it is: heads, parts of a projection, layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from divergence.diagnosis import orders
from divergence.result import Cause
from tests.diagnosis.faults import Plant, case_of, diagnosed, layer, planted
from tests.diagnosis.test_fused import neox, phi3, spread
from tests.models import MODELS, inputs_for, llama

LAYERS, WIDTH = 12, 16


def named(reference: Any, fault: Plant, kind: str) -> Cause:
    """The only cause that is found."""
    (found,) = diagnosed(reference, planted(reference, fault), inputs_for(kind)).causes
    assert found.explained is not None and found.explained > 0.999
    return found


def cross(model: Any) -> Any:
    """Cross-attention of the second layer of T5's decoder."""
    return model.decoder.block[1].layer[1].EncDecAttention


def exchange(model: Any) -> None:
    attention = cross(model)
    attention.k, attention.v = attention.v, attention.k


def test_keys_and_values_of_cross_attention_that_are_exchanged_are_named() -> None:
    found = named(MODELS["t5"](), exchange, "t5")
    assert (found.id, found.site) == ("kv_swapped", "decoder.layers.1.cross_key")
    path = "layer.1.EncDecAttention"
    assert found.parameters["exchanged"] == [f"{path}.k.weight", f"{path}.v.weight"]


@pytest.mark.parametrize(("name", "tensor"), [("k", "cross_key"), ("v", "cross_value")])
@pytest.mark.parametrize("order", [[1, 0, 3, 2], [1, 2, 3, 0], [2, 0, 3, 1]])
def test_the_order_of_heads_of_cross_attention_is_found(name: str, tensor: str, order: list[int]) -> None:
    def fault(model: Any) -> None:
        weight = getattr(cross(model), name).weight
        weight.copy_(weight.unflatten(0, (4, -1))[order].flatten(0, 1))

    found = named(MODELS["t5"](), fault, "t5")
    assert (found.id, found.site) == ("weight_permuted", f"decoder.layers.1.{tensor}")
    assert (found.parameters["unit"], found.parameters["order"]) == ("heads", order)


FUSED: dict[str, tuple[Callable[[], Any], str, int, dict[str, int]]] = {
    "gpt2": (MODELS["gpt2"], "attn.c_attn", 1, {"query": 32, "key": 32, "value": 32}),
    "phi3": (phi3, "self_attn.qkv_proj", 1, {"query": 64, "key": 32, "value": 32}),
    "neox": (neox, "attention.query_key_value", 4, {"query": 16, "key": 16, "value": 16}),
}
"""A model, its fused projection, how many times its rows begin anew, and the widths of its parts then."""


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("order", [["key", "query", "value"], ["value", "query", "key"]])
def test_the_order_of_query_key_and_value_in_a_fused_projection_is_found(kind: str, order: list[str]) -> None:
    make, path, groups, widths = FUSED[kind]

    def fault(model: Any) -> None:
        inner = getattr(model, "gpt_neox", model)
        one = inner.layers[1] if kind == "neox" else layer(model, 1)
        for parameter in one.get_submodule(path).parameters():
            rows = parameter if kind != "gpt2" else parameter.mT if parameter.dim() > 1 else parameter
            parts = rows.unflatten(0, (groups, -1)).split(list(widths.values()), 1)
            wrong = torch.cat([parts[[*widths].index(name)] for name in order], 1).flatten(0, 1)
            rows.copy_(wrong.clone())

    reference = spread(make()) if kind == "gpt2" else make()
    ids = torch.randint(0, 61, (1, 24), generator=torch.Generator().manual_seed(2))
    (found,) = diagnosed(reference, planted(reference, fault), {"input_ids": ids}).causes
    assert (found.id, found.site) == ("weight_permuted", "layers.1.key")
    assert found.explained is not None and found.explained > 0.999
    assert found.parameters["order"] == order
    assert f"the order {', '.join(order)}" in found.title


class Stacked(nn.Module):
    """A model that hands out keys and values of all layers, `[batch, layer, head, token, channel]`, those in
    `names` with the layers in the order of `key`."""

    def __init__(self, model: Any, key: Callable[[int], Any], names: tuple[str, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.key, self.names = key, names
        for ours, theirs in zip(self.parameters(), model, strict=True):
            ours.data = theirs.clone()

    def forward(self, states: Tensor) -> dict[str, Tensor]:
        made: dict[str, list[Tensor]] = {"keys": [], "values": []}
        for block in self.blocks:
            states, key, value = block(states)
            made["keys"].append(key)
            made["values"].append(value)
        for name in self.names:
            made[name] = [made[name][i] for i in sorted(range(LAYERS), key=self.key)]
        return {"states": states, **{name: torch.stack(parts, 1) for name, parts in made.items()}}


class Block(nn.Module):
    """Attention of two heads, which returns keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.cached: Callable[[Tensor], Tensor] = lambda tensor: tensor
        self.read = True

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.qkv(self.norm(states)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        shown = self.cached(key), self.cached(value)
        key, value = shown if self.read else (key, value)
        context = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return states + self.out(context.transpose(1, 2).flatten(2)), *shown


@pytest.mark.parametrize("names", [("keys", "values"), ("values",)])
def test_keys_and_values_that_are_handed_out_for_another_layer_are_named(names: tuple[str, ...]) -> None:
    torch.manual_seed(3)
    weights = [torch.randn(p.shape) * 0.3 for _ in range(LAYERS) for p in Block().parameters()]
    inputs = {"states": torch.randn(2, 9, WIDTH)}
    (found,) = diagnosed(Stacked(weights, int, names), Stacked(weights, str, names), inputs).causes
    tensor = names[0][:-1]
    assert (found.id, found.site) == ("layer_order", f"layers.2.{tensor}")
    assert found.explained is not None and found.explained > 0.999
    assert found.title.startswith(f"the {' and '.join(names)} that are handed out as layer 2's are those of")
    assert (found.parameters["layer"], found.parameters["holds"]) == (2, 10)
    assert found.parameters["sites"][:8] == [f"layers.{i}.{tensor}" for i in range(2, 10)]
    assert any("layers.2.hidden passes" in sentence for sentence in found.evidence)


@pytest.mark.parametrize(("heads", "queries"), [(2, 8), (4, 8), (2, 6)])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_weights_of_heads_that_are_tiled_for_every_query_are_named(
    heads: int, queries: int, implementation: str
) -> None:
    def make(count: int) -> Any:
        sizes = {"hidden_size": 8 * queries, "num_attention_heads": queries, "num_key_value_heads": count}
        return MODELS["llama"](**sizes, attn_implementation=implementation)

    reference, candidate = make(heads), make(queries)
    state = reference.state_dict()
    for name, weight in state.items():
        if "k_proj" in name or "v_proj" in name:
            tiled = weight.unflatten(0, (heads, -1)).repeat(queries // heads, 1, 1)
            state[name] = tiled.flatten(0, 1)
    candidate.load_state_dict(state)
    found = diagnosed(reference, candidate, inputs_for("llama", tokens=24)).causes[0]
    assert (found.id, found.site) == ("weight_permuted", "layers.0.key")
    assert found.parameters["change"] == "tiled"
    assert found.explained is not None and found.explained > 0.999


def lively(model: Any) -> Any:
    """Weights at random, gains of norms around one."""
    spread(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.normal_(1.0, 0.2, generator=torch.Generator().manual_seed(7))
    return model


def rows_of_heads(parameter: Tensor, axis: int, order: list[int]) -> Tensor:
    """`parameter` with the heads that lie along `axis` in that order."""
    whole = parameter.unflatten(axis, (len(order), -1)).movedim(axis, 0)[order]
    made: Tensor = whole.movedim(0, axis).flatten(axis, axis + 1).clone()
    return made


EIGHT = {"hidden_size": 64, "num_attention_heads": 8}
ATTENTIONS: dict[str, tuple[Callable[[], Any], str, str, str]] = {
    "llama": (partial(MODELS["llama"], **EIGHT), "model.layers.1.self_attn.", "q_proj", "o_proj"),
    "llama-eager": (partial(MODELS["llama-eager"], **EIGHT), "model.layers.1.self_attn.", "q_proj", "o_proj"),
    "gpt2": (MODELS["gpt2"], "transformer.h.1.attn.", "c_attn", "c_proj"),
    "bert": (MODELS["bert"], "encoder.layer.1.attention.", "self.query", "output.dense"),
    "t5": (MODELS["t5"], "decoder.block.1.layer.1.EncDecAttention.", "q", "o"),
}
"""A model, and where an attention of it projects queries and joins heads; T5's is cross-attention."""


@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("side", ["queries", "joined"])
def test_the_order_of_heads_that_only_the_hidden_states_show_is_found(kind: str, side: str) -> None:
    make, path, query, output = ATTENTIONS[kind]
    order = [4, 0, 5, 1, 6, 7, 2, 3] if "llama" in kind else [2, 0, 3, 1]

    def fault(model: Any) -> None:
        module = model.get_submodule(path + (query if side == "queries" else output))
        for parameter in module.parameters() if side == "queries" else [module.weight]:
            axis = 1 if (kind == "gpt2") == (side == "queries") and parameter.dim() > 1 else 0
            heads = parameter[..., :32] if kind == "gpt2" and side == "queries" else parameter
            heads.copy_(rows_of_heads(heads, axis, order))

    reference = lively(make())
    found = diagnosed(reference, planted(reference, fault), inputs_for(kind, 2, 24)).causes[0]
    assert (found.id, found.site.rpartition(".")[2]) == ("weight_permuted", "hidden")
    assert found.explained is not None and found.explained > 0.999
    assert (found.parameters["unit"], found.parameters["order"]) == (
        "heads" if side == "queries" else "input heads",
        order,
    )


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_no_order_of_heads_is_found_where_they_are_in_order(kind: str) -> None:
    make, path, query, output = ATTENTIONS[kind]

    def fault(model: Any) -> None:
        model.get_submodule(path + output).weight *= 1.3

    reference = lively(make())
    case = case_of(reference, planted(reference, fault), inputs_for(kind, 2, 24))
    where = list(orders.joined(case))[-1]
    assert where.query is not None
    assert f"{path}{output}.weight".endswith(where.output.name)
    assert f"{path}{query}.weight".endswith(where.query.name)
    assert where.heads * where.size == 32 * (2 if "llama" in kind else 1)
    before = case.memory.get("runs", 0)
    assert orders.of_inputs(case, where) is None
    assert orders.of_queries(case, where) is None
    assert case.memory.get("runs", 0) <= before + 3


def by_channel(attention: Any) -> None:
    """Heads are joined channel by channel."""
    size = attention.head_dim
    weight = attention.o_proj.weight
    weight.copy_(weight.unflatten(1, (size, -1)).transpose(1, 2).flatten(1, 2).clone())


def backwards(mlp: Any) -> None:
    mlp.up_proj.weight.copy_(mlp.up_proj.weight.flip(0))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [("self_attn", by_channel, "joined by channel"), ("mlp", backwards, "output in reverse")],
)
def test_channels_in_another_order_are_named(name: str, change: Callable[[Any], None], said: str) -> None:
    reference = MODELS["llama"]()
    found = named(reference, lambda model: change(getattr(layer(model, 1), name)), "llama")
    assert (found.id, found.site) == ("weight_permuted", "layers.1.hidden")
    assert found.parameters["change"] == said


def unwritten(first: int, last: int, shift: int | None) -> Callable[[Tensor], Tensor]:
    """Keys or values whose tokens from `first` to `last` hold those of `shift` tokens before, or zeros."""

    def change(tensor: Tensor) -> Tensor:
        wrong = torch.zeros_like(tensor) if shift is None else tensor.roll(shift, -2)
        at = torch.arange(tensor.shape[-2])[:, None]
        return torch.where((at >= first) & (at <= last), wrong, tensor)

    return change


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (unwritten(8, 8, 1), "what belongs to the token before at token 8"),
        (unwritten(1, 8, 1), "what belongs to the token before at tokens 1 to 8"),
        (unwritten(3, 5, None), "zeros at tokens 3 to 5"),
        (unwritten(2, 3, -1), "what belongs to the token after at tokens 2 to 3"),
    ],
)
def test_places_of_the_cache_that_are_not_written_are_named(
    read: bool, change: Callable[[Tensor], Tensor], said: str
) -> None:
    torch.manual_seed(3)
    weights = [torch.randn(p.shape) * 0.3 for _ in range(LAYERS) for p in Block().parameters()]
    reference, candidate = Stacked(weights, int, ()), Stacked(weights, int, ())
    block = candidate.blocks[2]
    assert isinstance(block, Block)
    block.cached, block.read = change, read
    found = diagnosed(reference, candidate, {"states": torch.randn(2, 9, WIDTH)}).causes[0]
    assert (found.id, found.site) == ("stale_kv", "layers.2.key")
    assert found.explained is not None and found.explained > 0.999
    assert found.title == f"the cache {'' if read else 'that is handed out '}holds {said}"


def test_a_weight_of_zeros_is_no_cache_that_is_not_written() -> None:
    inputs = inputs_for("llama")
    inputs["attention_mask"][:, :3] = 0
    reference = MODELS["llama"]()
    candidate = planted(reference, lambda model: layer(model, 1).self_attn.k_proj.weight.zero_())
    found = diagnosed(reference, candidate, inputs).causes[0]
    assert (found.id, found.site) == ("weights_collapsed", "layers.1.key")


@pytest.mark.parametrize(
    ("path", "axis", "said"),
    [
        ("mlp.down_proj", 1, "the inputs of 'mlp.down_proj.weight' stand in another order"),
        ("mlp.up_proj", 0, "the outputs of 'mlp.up_proj.weight' stand in another order"),
    ],
)
def test_any_order_of_a_weight_that_the_candidate_shows_is_named(path: str, axis: int, said: str) -> None:
    model = llama(3)
    weight = layer(model, 1).get_submodule(path).weight
    order = torch.randperm(weight.shape[axis], generator=torch.Generator().manual_seed(4))

    def mixed(model: Any) -> None:
        weight = layer(model, 1).get_submodule(path).weight
        weight.copy_(weight.index_select(axis, order))

    result = diagnosed(model, planted(model, mixed), inputs_for("llama", tokens=24))
    (found,) = result.causes
    assert (found.id, found.site, found.title) == ("weight_permuted", "layers.1.hidden", said)
    assert found.parameters["order"] == order.tolist()
    assert found.explained is not None
    assert found.explained > 0.999
