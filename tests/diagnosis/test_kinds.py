"""Faults in models that are built otherwise than most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from divergence.diagnosis.causes import CAUSES, rope_position
from divergence.diagnosis.hypotheses import Trial
from divergence.result import Cause
from tests.diagnosis.faults import diagnosed, every, layer, planted
from tests.models import MODELS, VOCABULARY, inputs_for


def built(kind: str, **config: Any) -> Any:
    """A small random model of a kind of transformers, every parameter of it random."""
    import transformers

    made = getattr(transformers, kind)
    settings = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, **config}
    generator = torch.Generator().manual_seed(0)
    model = made(made.config_class(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = "norm" in name or "ln" in name
            parameter.copy_(1 + 0.1 * noise if norm and "bias" not in name else 0.15 * noise)
    return model


def first_cause(reference: Any, fault: Callable[[Any], None], tokens: int = 40) -> Cause:
    """The first cause that is named for a model with a fault planted."""
    return diagnosed(reference, planted(reference, fault), inputs_for("llama", 1, tokens)).causes[0]


def phi(base: float = 10_000.0, part: float = 0.5) -> Any:
    """Phi, which turns a part of every head."""
    rotary = {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": part}
    return built("PhiForCausalLM", intermediate_size=64, num_attention_heads=4, rope_parameters=rotary)


@pytest.mark.parametrize("part", [0.25, 0.5, 1.0])
def test_the_base_of_a_rotary_embedding_of_part_of_a_head_is_found(part: float) -> None:
    inputs = inputs_for("llama", 1, 40)
    cause = diagnosed(phi(part=part), phi(base=70_000.0, part=part), inputs).causes[0]
    assert (cause.id, cause.site) == ("rope_position", "layers.0.key")
    assert cause.parameters["base"] == pytest.approx(70_000, rel=0.02)
    assert cause.explained is not None and cause.explained > 0.999


def test_less_than_half_a_head_turned_does_not_cost_the_other_causes_their_turn() -> None:
    def fault(model: Any) -> None:
        model.model.layers[1].mlp.fc2.weight.mul_(1.1)

    cause = first_cause(phi(part=0.25), fault)
    assert (cause.id, cause.site) == ("weight_scale", "layers.1.hidden")


def test_a_cause_whose_trials_cannot_be_made_is_a_note_and_the_others_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(_: object) -> Iterator[Trial]:
        raise RuntimeError("no such table")

    reference = MODELS["llama"]()
    monkeypatch.setattr(rope_position, "trials", broken)
    candidate = planted(reference, lambda model: layer(model, 1).self_attn.v_proj.weight.mul_(1.02))
    result = diagnosed(reference, candidate, inputs_for("llama"))
    assert [c.id for c in result.causes] == ["weight_scale"]
    candidate = planted(reference, lambda model: setattr(layer(model, 1).mlp, "act_fn", nn.ReLU()))
    monkeypatch.setattr("divergence.diagnosis.trying.CAUSES", (rope_position, *CAUSES))
    result = diagnosed(reference, candidate, inputs_for("llama"))
    assert [c.id for c in result.causes] == ["activation"]
    assert any("rope_position could not be emulated" in note for note in result.notes)


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
def test_a_whole_checkpoint_that_was_half_precision_once_is_told(kind: str) -> None:
    def fault(model: Any) -> None:
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())

    def spread(model: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    cause = first_cause(planted(MODELS[kind](), spread), fault)
    assert (cause.id, cause.site) == ("weight_precision", "layers.0.key")
    assert cause.parameters["precision"] == "bf16"
    assert "layers.2.key" in cause.parameters["sites"]
    # The sum of two embeddings that are rounded each is not the rounded sum.
    assert cause.explained is not None and cause.explained > (0.999 if kind == "llama" else 0.6)


def _attending(model: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Has attention add another mask than the reference's."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask
    from transformers.models.llama.modeling_llama import eager_attention_forward

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Tensor, **kwargs: Any) -> Any:
        return eager_attention_forward(module, query, key, value, change(mask), **kwargs)

    AttentionInterface.register("otherwise", attend)
    AttentionMaskInterface.register("otherwise", eager_mask)
    model.config._attn_implementation = "otherwise"


@pytest.mark.parametrize("value", [-5.0, -8.5])
@pytest.mark.parametrize("kind", ["llama", "llama-eager"])
def test_what_too_weak_a_mask_adds_is_estimated(kind: str, value: float) -> None:
    def fault(model: Any) -> None:
        _attending(model, lambda mask: mask.clamp(min=value))

    cause = first_cause(MODELS[kind](), fault)
    assert (cause.id, cause.site) == ("mask_leak", "layers.0.hidden")
    assert cause.parameters["value"] == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("gain", [0.001, 0.01, 0.02])
def test_a_weight_that_is_nearly_gone_is_no_weight_of_zeros(gain: float) -> None:
    def fault(model: Any) -> None:
        layer(model, 1).self_attn.v_proj.weight.mul_(gain)

    cause = first_cause(MODELS["llama"](), fault)
    assert (cause.id, cause.site) == ("weight_scale", "layers.1.value")
    assert cause.parameters["gain"] == pytest.approx(gain, rel=1e-3)


def test_bits_of_fp16_read_as_bf16_are_no_weight_of_zeros() -> None:
    def fault(model: Any) -> None:
        weight = layer(model, 1).self_attn.v_proj.weight
        weight.copy_(weight.half().view(torch.bfloat16).float())

    cause = first_cause(MODELS["llama"](), fault)
    assert (cause.id, cause.site) == ("dtype_misread", "layers.1.value")
    assert (cause.parameters["written"], cause.parameters["read"]) == ("fp16", "bf16")


def test_most_of_an_error_does_not_make_a_weight_zero() -> None:
    """What attention adds is lost behind the norm of the MLP, which still saw it."""

    def fault(model: Any) -> None:
        one = layer(model, 1)

        def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
            attended = one.self_attn(hidden_states=one.input_layernorm(hidden_states), **kwargs)[0]
            made: Tensor = one.mlp(one.post_attention_layernorm(hidden_states + attended))
            return hidden_states + made

        one.forward = forward

    reference = MODELS["llama"]()
    with torch.no_grad():
        layer(reference, 1).self_attn.o_proj.weight.mul_(3)
    cause = first_cause(reference, fault)
    assert (cause.id, cause.site) == ("unknown", "layers.1.hidden")


@pytest.mark.parametrize("squared", [lambda x: x.relu().square(), lambda x: x.relu() ** 2])
def test_a_square_left_out_after_the_activation_is_told(squared: Callable[[Tensor], Tensor]) -> None:
    def act(function: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
        return every(lambda one: one.mlp.__dict__.update(act_fn=function))

    reference = planted(MODELS["llama"](), every(lambda one: delattr(one.mlp, "act_fn")))
    reference = planted(reference, act(squared))
    cause = first_cause(reference, act(torch.relu))
    assert (cause.id, cause.site) == ("activation", "layers.0.hidden")
    assert cause.parameters == {
        "activation": "relu",
        "reference": "squared relu",
        "sites": ["layers.0.hidden", "layers.1.hidden", "layers.2.hidden"],
    }


def test_an_epsilon_beyond_the_usual_is_named_where_it_explains_everything() -> None:
    def fault(model: Any) -> None:
        layer(model, 1).post_attention_layernorm.variance_epsilon = 0.05

    cause = first_cause(MODELS["llama"](), fault)
    assert (cause.id, cause.site) == ("norm_eps", "layers.1.hidden")
    assert cause.parameters["epsilon"] == pytest.approx(0.05, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama", ("q_proj", "k_proj")),
        ("qwen2", ("q_proj", "k_proj")),
        ("qwen3", ("k_proj",)),
        ("llama", ("q_proj",)),
    ],
)
def test_rows_laid_out_for_the_other_rotary_embedding_are_told(kind: str, names: tuple[str, ...]) -> None:
    def fault(model: Any) -> None:
        for name in names:
            for tensor in layer(model, 1).self_attn.get_submodule(name).parameters():
                tensor.copy_(tensor.unflatten(0, (-1, 2, 4)).transpose(1, 2).flatten(0, 2))

    qwen2 = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    reference = built("Qwen2ForCausalLM", **qwen2) if kind == "qwen2" else MODELS[kind]()
    cause = first_cause(reference, fault)
    tensor = "key" if "k_proj" in names else "hidden"
    assert (cause.id, cause.site) == ("weight_permuted", f"layers.1.{tensor}")
    assert cause.parameters["change"] == "halves interleaved"
    assert {name.split(".")[1] for name in cause.parameters["parameters"]} == set(names)


def _sliding(window: int | None, attention: str = "eager") -> Any:
    sizes = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return built("MistralForCausalLM", sliding_window=window, attn_implementation=attention, **sizes)


@pytest.mark.parametrize(
    ("window", "attention", "padded"),
    [
        (9, "eager", True),
        (7, "sdpa", True),
        (12, "sdpa", False),
        (None, "sdpa", True),
        (None, "eager", False),
    ],
)
def test_a_sliding_window_of_another_length_is_told(window: int | None, attention: str, padded: bool) -> None:
    inputs = inputs_for("llama", 2, 24)
    if padded:
        inputs["attention_mask"][1, :5] = 0
    cause = diagnosed(_sliding(8, attention), _sliding(window, attention), inputs).causes[0]
    assert (cause.id, cause.site) == ("mask_leak", "layers.0.hidden")
    assert (cause.parameters["window"], cause.parameters["reference"]) == (window, 8)


@pytest.mark.parametrize("tensor", ["key", "value"])
def test_what_comes_of_the_encoder_alone_is_known_by_its_own_weights(tensor: str) -> None:
    def fault(model: Any) -> None:
        attention = model.model.decoder.layers[1].encoder_attn
        attention.get_submodule(f"{tensor[0]}_proj").weight.mul_(1.2)

    reference = MODELS["whisper"]()
    result = diagnosed(reference, planted(reference, fault), inputs_for("whisper"))
    cause = result.causes[0]
    assert (cause.id, cause.site) == ("weight_scale", f"decoder.layers.1.cross_{tensor}")
    assert cause.parameters["parameter"] == f"encoder_attn.{tensor[0]}_proj.weight"
    assert not [note for note in result.notes if "could not be emulated" in note]


def test_scores_of_a_product_that_takes_its_operands_by_name_are_scaled() -> None:
    def fault(model: Any) -> None:
        for tensor in model.transformer.h[1].self_attention.query_key_value.parameters():
            tensor.unflatten(0, (4, 3, -1))[:, 0].mul_(1.2)

    cause = first_cause(built("BloomForCausalLM", n_head=4, n_layer=3), fault)
    assert cause.id == "attention_scale"
    assert cause.parameters["factor"] == pytest.approx(1.2, rel=1e-3)


def test_a_residual_stream_of_rows_of_all_tokens_overflows_too() -> None:
    reference = MODELS["opt"]()
    with torch.no_grad():
        reference.model.decoder.layers[1].fc2.weight[7] *= 1e8
    result = diagnosed(reference, planted(reference, lambda m: m.half()), inputs_for("opt", 2, 12))
    assert [c.id for c in result.causes] == ["overflow_residual"]


def test_what_changes_nothing_is_not_listed() -> None:
    reference = planted(MODELS["llama"](), every(lambda one: setattr(one.mlp, "act_fn", nn.ReLU())))

    def fault(model: Any) -> None:
        weight = layer(model, 1).mlp.down_proj.weight
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * 0.05)

    result = diagnosed(reference, planted(reference, fault), inputs_for("llama"))
    titles = [h.title for h in result.diagnosis]
    assert len(titles) > 10
    assert "the activation is relu, and the reference's is relu" not in titles
    assert not [h.title for h in result.diagnosis if h.explained == 0]


def test_gelu_is_called_by_its_approximation() -> None:
    def fault(model: Any) -> None:
        layer(model, 1).mlp.act = nn.GELU()

    reference = planted(MODELS["gpt2"](), every(lambda one: setattr(one.mlp, "act", nn.GELU("tanh"))))
    cause = first_cause(reference, fault)
    assert cause.parameters == {"activation": "gelu (erf)", "reference": "gelu (tanh)"}


def test_an_activation_that_is_written_out_is_known_by_what_it_computes() -> None:
    class Quick(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(1.702 * x)

    def fault(model: Any) -> None:
        layer(model, 1).mlp.act_fn = nn.SiLU()

    reference = planted(MODELS["llama"](), every(lambda one: setattr(one.mlp, "act_fn", Quick())))
    cause = first_cause(reference, fault)
    assert (cause.id, cause.site) == ("activation", "layers.1.hidden")
    assert cause.parameters == {"activation": "silu", "reference": "quick gelu"}
