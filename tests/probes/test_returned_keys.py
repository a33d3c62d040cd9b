"""Keys and values that a PyTorch model returns and that are not what its attention read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import divergence
from divergence.probes import Observation
from divergence.probes.pytorch import PyTorchProbe
from tests.models import MODELS, inputs_for, llama

Pairs = list[tuple[Tensor, Tensor]]


class Returning(nn.Module):
    """A decoder that returns its keys and values, by layer, in a form of its own."""

    def __init__(self, form: Callable[[Pairs], Any], stale: int | None = None) -> None:
        super().__init__()
        self.inner = llama()
        self.form, self.stale = form, stale

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        output = self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=True)
        pairs = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        if self.stale is not None:
            keys, values = pairs[self.stale]
            pairs[self.stale] = keys.roll(1, 2), values
        returned = self.form(pairs)
        return {"logits": output.logits, **returned} if isinstance(returned, dict) else (output[0], returned)


def _named(key: str, value: str) -> Callable[[Pairs], dict[str, Tensor]]:
    def form(pairs: Pairs) -> dict[str, Tensor]:
        keys = {key.format(i): k for i, (k, _) in enumerate(pairs)}
        return keys | {value.format(i): v for i, (_, v) in enumerate(pairs)}

    return form


FORMS: dict[str, Callable[[Pairs], Any]] = {
    "dotted": _named("present.{}.key", "present.{}.value"),
    "numbered": _named("key_{}", "value_{}"),
    "letters": _named("k_{}", "v_{}"),
    "cache": lambda pairs: {"past_key_values": tuple(pairs)},
    "lists": lambda pairs: {"keys": [k for k, _ in pairs], "values": [v for _, v in pairs]},
    "tuple": tuple,
    "stacked": lambda pairs: {
        "k_all": torch.stack([k for k, _ in pairs]),
        "v_all": torch.stack([v for _, v in pairs], 1),
    },
}


def taken(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[dict[str, Observation], tuple[str, ...]]:
    """What a run hands over, by site, and what it notes."""
    seen: dict[str, Observation] = {}

    def keep(o: Observation) -> None:
        seen[str(o.site)] = Observation(o.site, o.tensor.clone(), o.axes, o.found)

    return seen, PyTorchProbe(model).run(inputs, keep).notes


@pytest.mark.parametrize("form", FORMS)
def test_a_stale_key_is_seen_in_whatever_form_it_is_returned(form: str) -> None:
    inputs = inputs_for("llama")
    clean, notes = taken(Returning(FORMS[form]), inputs)
    assert not notes
    stale, notes = taken(Returning(FORMS[form], stale=1), inputs)
    assert len(notes) == 1 and "the key of 1 layer is taken from the model's output" in notes[0]
    assert torch.equal(stale["layers.1.key"].tensor, clean["layers.1.key"].tensor.roll(1, 2))
    assert stale["layers.1.key"].found.startswith("model output")
    for site in ("layers.0.key", "layers.2.key", "layers.1.value"):
        assert stale[site].found == clean[site].found == "cache"


def test_a_cache_that_is_changed_after_the_run_fails() -> None:
    model = llama()
    changed = copy.deepcopy(model)

    def swap(module: Any, args: Any, output: Any) -> None:
        for layer in output.past_key_values.layers:
            layer.keys, layer.values = layer.values, layer.keys

    changed.register_forward_hook(swap)
    result = divergence.compare(model, changed, inputs_for("llama"))
    assert result.verdict == "fail"
    assert result.first_divergence is not None and result.first_divergence.site == "layers.0.key"


@pytest.mark.parametrize("tensor", ["key", "cross_key"])
@pytest.mark.parametrize("kind", ["t5", "whisper"])
def test_the_cache_of_an_encoder_and_decoder_is_the_decoders(kind: str, tensor: str) -> None:
    model, inputs = MODELS[kind](), inputs_for(kind)

    def roll(module: Any, args: Any, output: Any) -> None:
        cache = output.past_key_values
        part = cache.cross_attention_cache if tensor == "cross_key" else cache.self_attention_cache
        part.layers[1].keys = part.layers[1].keys.roll(1, 2)

    clean, notes = taken(model, inputs)
    assert not notes
    model.register_forward_hook(roll)
    seen, notes = taken(model, inputs)
    differing = [site for site in clean if not torch.equal(clean[site].tensor, seen[site].tensor)]
    assert differing == [f"decoder.layers.1.{tensor}"] and len(notes) == 1


def test_keys_of_as_many_tokens_as_heads_may_have_the_two_exchanged() -> None:
    inputs = {"input_ids": torch.tensor([[3, 5], [7, 2]]), "attention_mask": torch.ones(2, 2).long()}

    def form(pairs: Pairs) -> Any:
        return {"present": tuple((k.transpose(1, 2), v.transpose(1, 2)) for k, v in pairs)}

    seen, notes = taken(Returning(form), inputs)
    assert not notes and all(o.found == "cache" for o in seen.values() if o.site.tensor == "key")


def _unrotated(form: Callable[[Pairs], Any]) -> Callable[[Pairs], Any]:
    """`form` of keys that are as long as those that attention reads, and turned."""
    return lambda pairs: form([(k.roll(1, -1), v) for k, v in pairs])


@pytest.mark.parametrize("form", ["cache", "numbered", "stacked"])
def test_keys_from_before_a_rotation_are_left_alone(form: str) -> None:
    """Other forms of the model show the keys that attention reads."""
    seen, notes = taken(Returning(_unrotated(FORMS[form])), inputs_for("llama"))
    assert all(o.found == "cache" for o in seen.values() if o.site.tensor == "key")
    assert len(notes) == 1 and "turned against those that reach attention" in notes[0]


def test_keys_that_no_attention_reads_are_not_judged_by_a_replay() -> None:
    """A replayed layer gives what attention reads, here keys after a rotation."""

    class Unrotated(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.inner = Returning(_unrotated(FORMS["dotted"])).to(dtype)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return self.inner(input_ids, attention_mask)

    result = divergence.compare(
        Unrotated(torch.float32), Unrotated(torch.bfloat16), inputs_for("llama"), replay="always"
    )
    assert result.verdict == "pass"
    keys = [site for site in result.sites if site.site.startswith("layers") and "key" in site.site]
    assert len(keys) == 3 and all(site.introduced is None for site in keys)
