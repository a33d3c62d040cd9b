"""Masks that hide less than the reference's, or more, with and without a past."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import divergence
from divergence.diagnosis import masks, parts
from divergence.diagnosis.causes import mask_leak
from divergence.diagnosis.hypotheses import Trial
from divergence.result import Cause
from tests.diagnosis.faults import Plant, case_of, diagnosed, planted
from tests.diagnosis.test_decode import LAYERS, PAST, SIZES, Step, given
from tests.models import MODELS, inputs_for, llama

KINDS = ["llama", "llama-eager"]
TOKENS = 24

Seen = Callable[[Tensor], Tensor]
"""From what the reference lets be seen, bool `[batch, 1, query, key]`, to what is seen instead."""


def seeing(seen: Seen, first: str = "itself") -> Plant:
    """The fault of attention that sees something else.

    Args:
        seen: what.
        first: what becomes of queries that see nothing: `all` attend to all tokens alike, as scores that are
            all the lowest number do; `nothing` comes of a mask of booleans in torch's operator.
    """

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        visible = seen(mask == 0)
        low = torch.finfo(query.dtype).min
        scores = query @ key.transpose(-1, -2) * kwargs["scaling"]
        probabilities = scores.masked_fill(~visible, low).softmax(-1)
        if first == "nothing":
            probabilities = probabilities * visible.any(-1, keepdim=True)
        return (probabilities @ value).transpose(1, 2), None

    def fault(model: Any) -> None:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, eager_mask

        AttentionInterface.register("seeing", attend)
        AttentionMaskInterface.register("seeing", eager_mask)
        model.config._attn_implementation = "seeing"

    return fault


def distances(seen: Tensor) -> Tensor:
    """How far back every key lies, from another definition than that which is tested."""
    queries, keys = seen.shape[-2:]
    return torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None]


def ahead(steps: int) -> Seen:
    return lambda seen: seen | ((distances(seen) < 0) & (distances(seen) >= -steps))


def window(length: int) -> Seen:
    return lambda seen: seen & (distances(seen) < length)


def strict(seen: Tensor) -> Tensor:
    return seen & (distances(seen) != 0)


def strict_but_first(seen: Tensor) -> Tensor:
    alone = seen.sum(-1, keepdim=True) == 1
    return strict(seen) | (seen & alone)


def padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    inputs["attention_mask"][1, :5] = 0
    return inputs


def found(reference: nn.Module, candidate: nn.Module, inputs: dict[str, Tensor]) -> Cause:
    """The first cause, which has to be a mask that leaves nothing to explain."""
    cause = diagnosed(reference, candidate, inputs).causes[0]
    assert (cause.id, cause.site) == ("mask_leak", "layers.0.hidden")
    assert cause.explained is not None and cause.explained > 0.999
    return cause


def of_past(kind: str, fault: Plant, tokens: int) -> Cause:
    model = llama(LAYERS, **SIZES, attn_implementation=kind)
    return found(Step(model), Step(planted(model, fault)), given(model, tokens))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("steps", "tokens"), [(1, 3), (1, 6), (2, 6), (1, PAST + 3)])
def test_a_causal_mask_that_is_off_is_told_with_any_past(attention: str, steps: int, tokens: int) -> None:
    cause = of_past(attention, seeing(ahead(steps)), tokens)
    assert cause.parameters == {"ahead": steps, **_sites(cause)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("length", "tokens"), [(8, 1), (16, 2), (29, 12), (43, 6)])
def test_a_window_that_hides_the_past_is_told(attention: str, length: int, tokens: int) -> None:
    cause = of_past(attention, seeing(window(length)), tokens)
    assert cause.parameters == {"window": length, "reference": None, **_sites(cause)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_tokens_that_see_the_past_but_not_themselves_are_told(attention: str, tokens: int) -> None:
    assert of_past(attention, seeing(strict), tokens).parameters["ahead"] == -1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("length", [1, 7, 8, 22])
def test_a_window_that_the_reference_lacks_is_told(kind: str, pads: bool, length: int) -> None:
    reference = MODELS[kind]()
    inputs = inputs_for(kind, 2, TOKENS)
    inputs = padded(inputs) if pads else inputs
    cause = found(reference, planted(reference, seeing(window(length))), inputs)
    assert cause.title == (
        f"the attention mask hides more than the reference's: a sliding window of {length} "
        f"token{'' if length == 1 else 's'}"
    )
    assert cause.parameters == {"window": length, "reference": None, **_sites(cause)}
    assert "sliding_window" in cause.fix


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize(
    ("fault", "first"),
    [
        (seeing(strict_but_first), "itself"),
        (seeing(strict), "all"),
        (seeing(strict, "nothing"), "nothing"),
    ],
)
def test_a_token_that_does_not_see_itself_is_told(kind: str, pads: bool, fault: Plant, first: str) -> None:
    reference = MODELS[kind]()
    inputs = inputs_for(kind, 2, TOKENS)
    inputs = padded(inputs) if pads else inputs
    cause = found(reference, planted(reference, fault), inputs)
    assert "a token does not see itself" in cause.title
    assert cause.parameters == {"ahead": -1, "first": first, **_sites(cause)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_window_is_told_through_rounding(dtype: torch.dtype) -> None:
    reference = MODELS["llama"]()
    candidate = planted(reference, seeing(window(8))).to(dtype)
    cause = diagnosed(reference, candidate, inputs_for("llama", 2, TOKENS)).causes[0]
    assert (cause.id, cause.site, cause.parameters["window"]) == ("mask_leak", "layers.0.hidden", 8)


def test_a_token_that_does_not_see_itself_is_told_where_rounding_hides_some_of_it() -> None:
    reference = MODELS["llama"](initializer_range=0.02)
    candidate = planted(reference, seeing(strict_but_first)).to(torch.bfloat16)
    cause = diagnosed(reference, candidate, inputs_for("llama", 2, TOKENS)).causes[0]
    assert (cause.id, cause.parameters["first"]) == ("mask_leak", "itself")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_causal_mask_that_the_reference_lacks_is_told(attention: str) -> None:
    reference = MODELS["bert"](attn_implementation=attention)
    inputs = inputs_for("bert", 2, TOKENS)
    inputs["attention_mask"][1, 20:] = 0
    candidate = planted(reference, seeing(lambda seen: seen & (distances(seen) >= 0)))
    cause = found(reference, candidate, inputs)
    assert cause.title == "the attention mask hides more than the reference's: later tokens"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_another_way_to_write_the_same_mask_passes(attention: str, tokens: int) -> None:
    model = llama(LAYERS, **SIZES, attn_implementation=attention)
    same = planted(model, seeing(lambda seen: seen))
    assert divergence.compare(Step(model), Step(same), given(model, tokens)).verdict == "pass"


@pytest.mark.parametrize("kind", [*KINDS, "gpt2", "gemma2", "bert", "opt"])
def test_what_is_no_mask_costs_few_emulations(kind: str) -> None:
    reference = MODELS[kind]()

    def fault(model: Any) -> None:
        weights = [
            p for n, p in model.named_parameters() if "layer.1." in n or "layers.1." in n or "h.1." in n
        ]
        weights[-2 if kind in ("bert", "opt", "gpt2") else 0].mul_(1.3)

    case = case_of(reference, planted(reference, fault), inputs_for(kind, 2, TOKENS))
    case.emulated(masks.with_mask(parts.attentions(case.trace)[0], masks.same))
    before = case.memory["runs"]
    trials: list[Trial] = list(mask_leak.trials(case))
    assert case.memory["runs"] - before <= 8
    assert not any("window" in trial.key for trial in trials if kind != "gemma2")


def test_empty_places_of_a_cache_are_no_past() -> None:
    hidden = torch.ones(1, 1, 3, 12, dtype=torch.bool).triu(6)
    assert torch.equal(masks.distances(hidden), torch.arange(5, 8)[:, None] - torch.arange(12))
    assert torch.equal(
        masks.distances(torch.zeros_like(hidden)), torch.arange(9, 12)[:, None] - torch.arange(12)
    )


def _sites(cause: Cause) -> dict[str, Any]:
    return {name: cause.parameters[name] for name in ("sites",) if name in cause.parameters}


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_that_leaves_the_first_token_nothing_to_see_makes_nan(kind: str) -> None:
    model = MODELS[kind]()

    def strict(model: Any) -> None:
        from transformers import AttentionInterface

        def attend(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any
        ) -> Any:
            groups = query.shape[1] // key.shape[1]
            key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
            before = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(-1)
            scores = query @ key.transpose(-1, -2) * kwargs["scaling"]
            made = scores.masked_fill(~before, -torch.inf).softmax(-1) @ value
            return made.transpose(1, 2), None

        AttentionInterface.register("strict", attend)
        model.config._attn_implementation = "strict"

    inputs = {"input_ids": inputs_for(kind, tokens=12)["input_ids"]}
    (found,) = diagnosed(model, planted(model, strict), inputs).causes
    assert (found.id, found.site) == ("mask_nan", "layers.0.hidden")
    assert found.parameters["mask"] == "strict"
    assert found.explained == 1.0


@pytest.mark.parametrize("token", [1, 5, 14])
@pytest.mark.parametrize("itself", [False, True])
def test_one_token_that_others_do_not_see_is_named(token: int, itself: bool) -> None:
    def hidden(seen: Tensor) -> Tensor:
        queries, keys = (torch.arange(n) for n in seen.shape[-2:])
        later = queries[:, None] >= token + (not itself)
        return seen & ~(later & (keys == token))

    model = MODELS["llama-eager"]()
    inputs = {"input_ids": inputs_for("llama", tokens=TOKENS)["input_ids"]}
    (found,) = diagnosed(model, planted(model, seeing(hidden)), inputs).causes
    assert (found.id, found.site) == ("mask_leak", "layers.0.hidden")
    assert (found.parameters["hides"], found.parameters["token"]) == ("one", token)
    assert ("which no token sees" in found.title) is itself
    assert found.explained is not None
    assert found.explained > 0.999
