"""Every cause is named first on a model with just that fault, its parameter estimated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import divergence
from divergence.probes import RunFacts
from divergence.probes.fake import FakeProbe
from tests.diagnosis.faults import diagnosed, every, layer, planted, rotary
from tests.models import MODELS, inputs_for


@dataclass(frozen=True)
class Known:
    """A fault and what has to be said of it."""

    cause: str
    site: str
    fault: Callable[[Any], None]
    model: str = "llama"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    explained: float = 0.999
    tokens: int = 40


def _swapped(model: Any) -> None:
    attention = layer(model, 1).self_attn
    attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj


def _heads(model: Any) -> None:
    weight = layer(model, 1).self_attn.v_proj.weight
    weight.copy_(weight.unflatten(0, (2, -1)).flip(0).flatten(0, 1))


def _order(model: Any) -> None:
    layers = model.model.layers
    layers[0].load_state_dict(layers[2].state_dict())


def _int8(weight: Tensor) -> Tensor:
    step = weight.abs().max() / 127
    return (weight / step).round() * step


def _fp8(weight: Tensor) -> Tensor:
    scale = weight.abs().max() / 448
    return (weight / scale).to(torch.float8_e4m3fn).to(weight.dtype) * scale


def _misread(weight: Tensor) -> Tensor:
    return weight.to(torch.bfloat16).view(torch.float16).to(weight.dtype).nan_to_num()


def _set(name: str, value: Any) -> Callable[[Any], None]:
    *path, leaf = name.split(".")

    def change(module: Any) -> None:
        for part in path:
            module = getattr(module, part)
        setattr(module, leaf, value)

    return change


def _weight(index: int, name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Any], None]:
    def fault(model: Any) -> None:
        weight = layer(model, index).get_submodule(name).weight
        weight.copy_(change(weight))

    return fault


def _softmax_bf16(model: Any) -> None:
    for one in model.model.layers:
        one.self_attn.config._attn_implementation = "bf16-softmax"


def _bf16_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Any:
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * kwargs["scaling"]
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return (scores.bfloat16().softmax(-1).float() @ value).transpose(1, 2), None


def _ahead(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    seen = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril(1)
    made = nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=kwargs["scaling"])
    return made.transpose(1, 2), None


def _blind(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    made = nn.functional.scaled_dot_product_attention(query, key, value, scale=kwargs["scaling"])
    return made.transpose(1, 2), None


def _attention(function: Callable[..., Any]) -> Callable[[Any], None]:
    def fault(model: Any) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        name = function.__name__
        ALL_ATTENTION_FUNCTIONS.register(name, function)
        model.config._attn_implementation = name

    return fault


def _rounded(*names: str, dtype: torch.dtype = torch.bfloat16) -> Callable[[Any], None]:
    def through(name: str, tensor: Tensor) -> Tensor:
        return tensor.to(dtype).float() if name in names else tensor

    return rotary(
        lambda position, inv_freq: through(
            "angle", through("position", position) * through("inv_freq", inv_freq)
        )
    )


class _Accumulating(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(*x.shape[:-1], self.out_features, dtype=torch.float16)
        for start in range(0, x.shape[-1], 16):
            total = (total.float() + x[..., start : start + 16] @ self.weight.T[start : start + 16]).half()
        return total.float()


class _Tf32(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        from divergence.emulation import round_tf32

        return nn.functional.linear(round_tf32(x), round_tf32(self.weight))


def _linear(kind: type[nn.Linear]) -> Callable[[Any], None]:
    def change(one: Any) -> None:
        for module in one.modules():
            if type(module) is nn.Linear:
                module.__class__ = kind

    return every(change)


KNOWN = {
    "value gain": Known(
        "weight_scale",
        "layers.1.value",
        _weight(1, "self_attn.v_proj", lambda w: w * 1.02),
        parameters={"gain": 1.02},
    ),
    "down gain": Known(
        "weight_scale",
        "layers.1.hidden",
        _weight(1, "mlp.down_proj", lambda w: w * 1.1),
        "qwen3",
        {"gain": 1.1},
    ),
    "fused gain": Known(
        "weight_scale",
        "layers.1.hidden",
        lambda m: layer(m, 1).mlp.c_proj.weight.mul_(0.9),
        "gpt2",
        {"gain": 0.9},
    ),
    "heads": Known("weight_permuted", "layers.1.value", _heads, parameters={"order": [1, 0]}),
    "swapped": Known("kv_swapped", "layers.1.key", _swapped),
    "order": Known("layer_order", "layers.0.key", _order, parameters={"holds": 2}),
    "zero": Known(
        "weights_collapsed",
        "layers.1.hidden",
        _weight(1, "mlp.down_proj", torch.zeros_like),
        parameters={"value": 0.0},
    ),
    "int8": Known(
        "quant_int8", "layers.1.key", _weight(1, "self_attn.k_proj", _int8), parameters={"per_tensor": True}
    ),
    "fp8": Known(
        "quant_fp8", "layers.1.value", _weight(1, "self_attn.v_proj", _fp8), "gemma2", {"format": "e4m3"}
    ),
    "bf16 weight": Known(
        "weight_precision",
        "layers.1.value",
        _weight(1, "self_attn.v_proj", lambda w: w.bfloat16().float()),
        parameters={"precision": "bf16"},
    ),
    "misread weight": Known("dtype_misread", "layers.1.value", _weight(1, "self_attn.v_proj", _misread)),
    "eps": Known(
        "norm_eps",
        "layers.0.key",
        every(_set("input_layernorm.variance_epsilon", 1e-3)),
        parameters={"epsilon": 1e-3},
    ),
    "no eps": Known(
        "norm_eps",
        "layers.0.key",
        every(_set("input_layernorm.variance_epsilon", 0.0)),
        parameters={"epsilon": 0.0},
    ),
    "eps layer norm": Known(
        "norm_eps", "layers.0.hidden", every(_set("ln_2.eps", 1e-3)), "gpt2", {"epsilon": 1e-3}
    ),
    "offset": Known(
        "norm_offset",
        "layers.1.key",
        lambda m: layer(m, 1).input_layernorm.weight.sub_(1),
        "gemma2",
        {"offset": -1.0},
    ),
    "activation": Known("activation", "layers.0.hidden", every(_set("mlp.act_fn", nn.GELU()))),
    "gelu": Known("activation", "layers.0.hidden", every(_set("mlp.act", nn.GELU())), "gpt2"),
    "scale": Known(
        "attention_scale",
        "layers.0.hidden",
        every(_set("self_attn.scaling", 0.5)),
        parameters={"factor": 0.5 * 8**0.5},
    ),
    "scale eager": Known(
        "attention_scale",
        "layers.0.hidden",
        every(_set("self_attn.scaling", 0.5)),
        "llama-eager",
        {"factor": 0.5 * 8**0.5},
    ),
    "softmax": Known(
        "softmax_precision", "layers.0.hidden", _attention(_bf16_attention), parameters={"precision": "bf16"}
    ),
    "mask ahead": Known("mask_leak", "layers.0.hidden", _attention(_ahead), parameters={"ahead": 1}),
    "mask ahead eager": Known(
        "mask_leak", "layers.0.hidden", _attention(_ahead), "llama-eager", {"ahead": 1}
    ),
    "no mask": Known("mask_missing", "layers.0.hidden", _attention(_blind)),
    "rope bf16": Known(
        "rope_precision",
        "layers.0.key",
        _rounded("position", "inv_freq", "angle"),
        parameters={"precision": "bf16", "rounded": ["position", "inv_freq", "angle"]},
        tokens=400,
    ),
    "rope inv_freq": Known(
        "rope_precision",
        "layers.0.key",
        _rounded("inv_freq"),
        "gemma2",
        {"precision": "bf16", "rounded": ["inv_freq"]},
    ),
    "rope angle fp16": Known(
        "rope_precision",
        "layers.0.key",
        _rounded("angle", dtype=torch.float16),
        "qwen3",
        {"precision": "fp16", "rounded": ["angle"]},
        tokens=100,
    ),
    "rope shift": Known(
        "rope_position", "layers.0.key", rotary(lambda p, f: (p + 7) * f), parameters={"offset": 7}
    ),
    "rope backwards": Known(
        "rope_layout", "layers.0.key", rotary(lambda p, f: -p * f), parameters={"sign": -1.0}
    ),
    "accumulation": Known(
        "accumulation_precision",
        "layers.0.key",
        _linear(_Accumulating),
        parameters={"accumulator": "fp16", "terms": 16},
    ),
    "tf32": Known("tf32", "layers.0.key", _linear(_Tf32)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_fault_is_named_first_and_its_emulation_explains_the_error(name: str) -> None:
    known = KNOWN[name]
    reference = MODELS[known.model]()
    result = diagnosed(reference, planted(reference, known.fault), inputs_for(known.model, 1, known.tokens))
    cause = result.causes[0]
    assert (cause.id, cause.site) == (known.cause, known.site)
    assert cause.explained is not None and cause.explained > known.explained
    assert cause.fix and cause.evidence
    for parameter, value in known.parameters.items():
        found = cause.parameters[parameter]
        assert found == pytest.approx(value, rel=2e-2) if isinstance(value, float) else found == value


def test_a_missing_bias_is_told_from_a_fused_projection() -> None:
    def biased(model: Any) -> None:
        layer(model, 1).attn.c_attn.bias.normal_()

    def fault(model: Any) -> None:
        layer(model, 1).attn.c_attn.bias[64:] = 0

    reference = planted(MODELS["gpt2"](), biased)
    cause = diagnosed(reference, planted(reference, fault), inputs_for("gpt2")).causes[0]
    assert cause.id == "bias_missing" and cause.site == "layers.1.value"
    assert cause.parameters["parameters"] == ["attn.c_attn.bias (value)"]


def test_two_faults_in_two_layers_are_both_named() -> None:
    def fault(model: Any) -> None:
        layer(model, 0).self_attn.v_proj.weight.mul_(1.02)
        layer(model, 2).mlp.act_fn = nn.GELU()

    reference = MODELS["llama"]()
    result = diagnosed(reference, planted(reference, fault), inputs_for("llama"))
    assert [(c.id, c.site) for c in result.causes] == [
        ("weight_scale", "layers.0.value"),
        ("activation", "layers.2.hidden"),
    ]


def test_two_faults_in_one_layer_are_both_named() -> None:
    def fault(model: Any) -> None:
        layer(model, 1).self_attn.k_proj.weight.mul_(1.05)
        layer(model, 1).mlp.act_fn = nn.GELU()

    reference = MODELS["llama"]()
    result = diagnosed(reference, planted(reference, fault), inputs_for("llama"))
    assert [(c.id, c.site) for c in result.causes] == [
        ("weight_scale", "layers.1.key"),
        ("activation", "layers.1.hidden"),
    ]


def test_a_second_fault_in_a_layer_of_a_fault_that_is_everywhere_is_named_at_its_own_site() -> None:
    def fault(model: Any) -> None:
        KNOWN["rope inv_freq"].fault(model)
        layer(model, 1).mlp.down_proj.weight.mul_(1.05)

    reference = MODELS["llama"]()
    result = diagnosed(reference, planted(reference, fault), inputs_for("llama", 1, 40))
    assert [(c.id, c.site) for c in result.causes] == [
        ("rope_precision", "layers.0.key"),
        ("weight_scale", "layers.1.hidden"),
    ]
    assert result.causes[0].parameters["sites"] == ["layers.0.key", "layers.1.key", "layers.2.key"]


def test_noise_is_unknown_and_comes_with_facts() -> None:
    def fault(model: Any) -> None:
        weight = layer(model, 1).mlp.down_proj.weight
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * 0.05)

    reference = MODELS["llama"]()
    result = diagnosed(reference, planted(reference, fault), inputs_for("llama"))
    assert [c.id for c in result.causes] == ["unknown"]
    assert result.causes[0].explained is None
    assert any("key, value pass" in line for line in result.causes[0].evidence)
    assert len(result.diagnosis) > 10


def test_a_healthy_candidate_has_no_causes() -> None:
    reference = MODELS["llama"]()
    result = divergence.compare(reference, planted(reference, lambda _: None), inputs_for("llama"))
    assert result.verdict == "pass" and not result.causes and not result.diagnosis


def test_no_diagnosis_is_made_where_none_is_asked_for() -> None:
    reference = MODELS["llama"]()
    candidate = planted(reference, KNOWN["value gain"].fault)
    result = divergence.compare(reference, candidate, inputs_for("llama"), diagnose=False)
    assert result.verdict == "fail" and not result.causes


def test_the_layer_before_is_looked_at_where_only_keys_and_values_show() -> None:
    reference = MODELS["llama"]()
    candidate = planted(reference, every(_set("mlp.act_fn", nn.GELU())))
    seen: dict[str, Tensor] = {}
    candidate_run = divergence.compare(reference, candidate, inputs_for("llama"), diagnose=False)
    assert candidate_run.verdict == "fail"
    from divergence.probes.pytorch import PyTorchProbe

    PyTorchProbe(candidate).run(
        inputs_for("llama"), lambda o: seen.__setitem__(str(o.site), o.tensor.clone())
    )
    shown = {site: t for site, t in seen.items() if site.endswith((".key", ".value"))}
    result = diagnosed(
        reference, FakeProbe(shown), inputs_for("llama"), precision="fp32", exclude=["*.hidden", "output.*"]
    )
    assert (result.causes[0].id, result.causes[0].site) == ("activation", "layers.1.key")


@pytest.mark.parametrize(
    ("details", "cause"),
    [
        ({"stream_hazard": {"hazard": True, "evidence": ["two runs differ"]}}, "stream_hazard"),
        ({"observer": {"changed": True, "outputs": {"logits": {"max_abs": 0.5}}}}, "observer_effect"),
    ],
)
def test_what_the_engine_probe_found_out_comes_first(
    monkeypatch: pytest.MonkeyPatch, details: dict[str, Any], cause: str
) -> None:
    from divergence.probes.pytorch import PyTorchProbe

    class Telling(PyTorchProbe):
        def run(self, *args: Any, **kwargs: Any) -> RunFacts:
            facts = super().run(*args, **kwargs)
            return RunFacts(**{**vars(facts), "details": {**facts.details, **details}})

    reference = MODELS["llama"]()
    candidate = Telling(planted(reference, KNOWN["value gain"].fault))
    result = diagnosed(reference, candidate, inputs_for("llama"))
    assert [c.id for c in result.causes] == [cause, "weight_scale"]
    assert result.causes[0].explained is None and result.causes[0].evidence


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("heads", [2, 4])
def test_groups_of_queries_that_read_other_keys_are_named(implementation: str, heads: int) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": heads}
    reference = MODELS["llama"](**sizes, attn_implementation=implementation)
    candidate = planted(MODELS["llama"](**sizes, attn_implementation="eager"), _attention(_tiled))
    found = diagnosed(reference, candidate, inputs_for("llama", tokens=24)).causes[0]
    assert (found.id, found.site) == ("weight_permuted", "layers.0.hidden")
    assert found.parameters["change"] == "tiled"
    assert found.explained is not None
    assert found.explained > 0.999


def _tiled(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    key, value = (t.repeat(1, query.shape[1] // t.shape[1], 1, 1) for t in (key, value))
    made = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=kwargs["scaling"]
    )
    return made.transpose(1, 2), None


def test_outputs_that_only_hold_the_layers_keys_get_no_cause_of_their_own() -> None:
    from divergence.demo.model import DemoDecoder

    def fault(model: Any) -> None:
        model.layers[1].self_attn.k_proj.weight.mul_(1.05)

    reference = DemoDecoder().eval()
    inputs = {"input_ids": torch.arange(24)[None] * 7 % 512}
    result = diagnosed(reference, planted(reference, fault), inputs)
    assert result.verdict == "fail"
    assert [(c.id, c.site) for c in result.causes] == [("weight_scale", "layers.1.key")]


def test_an_emulation_that_breaks_does_not_cost_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    from divergence.diagnosis import search, trying

    def broken(*_: Any) -> None:
        raise RuntimeError("no such operator")

    reference = MODELS["llama"]()
    candidate = planted(reference, KNOWN["value gain"].fault)
    monkeypatch.setattr(trying, "attempt", broken)
    result = diagnosed(reference, candidate, inputs_for("llama"))
    assert [c.id for c in result.causes] == ["unknown"]
    assert any("weight_scale could not be emulated" in note for note in result.notes)
    monkeypatch.setattr(search, "investigate", broken)
    result = diagnosed(reference, candidate, inputs_for("llama"))
    assert not result.causes
    assert any(
        "the cause could not be looked for (RuntimeError: no such operator)" in n for n in result.notes
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_attention_kernel_in_half_precision_is_named(dtype: torch.dtype) -> None:
    def half(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Any:
        groups = query.shape[1] // key.shape[1]
        query, key, value = (
            t.to(dtype).float() for t in (query, *(t.repeat_interleave(groups, 1) for t in (key, value)))
        )
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        scores = (query @ key.transpose(2, 3) * kwargs["scaling"]).masked_fill(~seen, float("-inf"))
        made = (scores.softmax(-1).to(dtype).float() @ value).to(dtype).float()
        return made.transpose(1, 2), None

    reference = MODELS["llama"]()
    found = diagnosed(reference, planted(reference, _attention(half)), inputs_for("llama", tokens=24)).causes[
        0
    ]
    assert (found.id, found.site) == ("softmax_precision", "layers.0.hidden")
    assert found.title.startswith(
        f"all of the attention runs in {'bf16' if dtype is torch.bfloat16 else 'fp16'}"
    )
    assert found.explained is not None
    assert found.explained > 0.95


def test_scores_that_are_not_capped_are_named() -> None:
    def uncapped(model: Any) -> None:
        for one in model.model.layers:
            one.self_attn.attn_logit_softcapping = None

    reference = MODELS["gemma2"](
        attn_logit_softcapping=0.5, attn_implementation="eager", initializer_range=0.3
    )
    found = diagnosed(reference, planted(reference, uncapped), inputs_for("gemma2", tokens=24)).causes[0]
    assert (found.id, found.site) == ("activation", "layers.0.hidden")
    assert found.title == "the attention scores are not capped: the reference's go through a tanh"
    assert found.explained is not None
    assert found.explained > 0.999
