"""The main job between PyTorch modules: planted faults whose layer and tensor are known."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import divergence
from divergence.captures import open_capture
from divergence.config import Config, Tolerance, parse_tolerance
from divergence.demo.model import DemoConfig, DemoDecoder
from divergence.errors import ConfigurationError, InputError, SourceError
from divergence.pipeline import compare, record
from divergence.probes import silent
from divergence.probes.fake import FakeProbe
from divergence.probes.pytorch import PyTorchProbe
from divergence.result import Comparison
from tests.models import MODELS, inputs_for, llama

LAYERS = 6
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def judged(ref: Any, cand: Any, inputs: Any = None, **options: Any) -> Comparison:
    """Compares without any configuration file."""
    given = inputs_for("llama", tokens=33) if inputs is None else inputs
    return compare(ref, cand, given, config=Config(), **options)


def faulty(model: Any, layer: int, projection: str = "v_proj", gain: float = 1.02) -> Any:
    """A copy with one projection too large."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_submodule(f"model.layers.{layer}.self_attn.{projection}").weight.mul_(gain)
    return model


def stored(model: Any, precision: str) -> Any:
    """A copy with its parameters in `precision`."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[precision])
    return model


def test_a_model_against_itself_is_equal_to_the_bit() -> None:
    model = llama(LAYERS)
    result = judged(model, model)
    assert (result.verdict, result.reason) == ("pass", "all 19 sites are equal to the bit")
    assert all(s.bit_equal for s in result.sites)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3", "gpt2", "bert", "opt", "t5", "whisper"])
def test_a_clean_candidate_passes(kind: str, precision: str) -> None:
    model = MODELS[kind]()
    candidate = stored(model, precision)
    if precision == "fp32":
        candidate.config._attn_implementation = "eager"
    inputs = inputs_for(kind, tokens=17)
    given = {n: t.to(DTYPES[precision]) if t.is_floating_point() else t for n, t in inputs.items()}
    assert judged(Cast(model, DTYPES[precision]), Cast(candidate, DTYPES[precision]), given).verdict == "pass"


class Cast(nn.Module):
    """Takes inputs in one dtype and hands them over in that of the model."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Any:
        dtype = next(self.model.parameters()).dtype
        return self.model(**{n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()})


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("layer", [0, 3, 5])
@pytest.mark.parametrize(
    ("projection", "tensor"), [("v_proj", "value"), ("k_proj", "key"), ("o_proj", "hidden")]
)
def test_a_gain_of_two_percent_is_found(precision: str, layer: int, projection: str, tensor: str) -> None:
    model = llama(LAYERS)
    gain = 1.02 if tensor != "hidden" else 1.1
    result = judged(model, stored(faulty(model, layer, projection, gain), precision))
    assert result.verdict == "fail"
    assert result.first_divergence is not None
    assert result.first_divergence.site == f"layers.{layer}.{tensor}"
    # Later layers only pass on what came in.
    assert all(s.verdict == "pass" for s in result.sites if s.layer is not None and s.layer > layer)


def chaotic() -> Any:
    """A model that multiplies every error: sharp attention in every layer."""
    return llama(12, initializer_range=0.6)


def test_a_clean_half_precision_run_of_a_chaotic_model_passes_and_a_fault_does_not() -> None:
    model = chaotic()
    clean = judged(model, stored(model, "bf16"))
    assert (clean.site("layers.11.hidden").rel_l2 or 0.0) > 0.1, "not chaotic: this test would show nothing"
    assert clean.verdict == "pass", clean.reason
    result = judged(model, stored(faulty(model, 7), "bf16"))
    assert result.first_divergence is not None
    assert result.first_divergence.site == "layers.7.value"


def test_padding_is_excluded_and_shown_apart() -> None:
    model = llama(LAYERS)
    inputs = inputs_for("llama", tokens=12)
    inputs["attention_mask"][0, :5] = 0

    class Spoiled(nn.Module):
        """Spoils the embedding of padded tokens, which no valid token may see."""

        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(model)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            wrong = torch.where(attention_mask == 0, 5, input_ids)
            return self.model(input_ids=wrong, attention_mask=attention_mask)

    result = judged(model, Spoiled(), inputs)
    assert result.verdict == "pass", result.reason
    assert (result.site("layers.0.value").padded_max_abs or 0) > 1e-3


@pytest.mark.parametrize(
    ("name", "config"),
    [("src_key_padding_mask", Config()), ("pad", Config(mask="not pad")), ("pad", Config())],
)
def test_padding_by_other_names_is_excluded_where_it_is_known(name: str, config: Config) -> None:
    reference = {f"layers.0.{tensor}": torch.randn(1, 2, 5, 8) for tensor in ("key", "value")}
    reference["layers.0.hidden"] = torch.randn(1, 5, 16)
    candidate = {site: tensor.clone() for site, tensor in reference.items()}
    for tensor in candidate.values():
        tensor[..., 3:, :] = 7.0
    inputs = {name: torch.tensor([[False, False, False, True, True]])}
    sides = FakeProbe(reference), FakeProbe(candidate)
    result = compare(*sides, inputs, config=config, tolerance=LIMITS, replay="never")
    unknown = name == "pad" and config.mask is None
    assert result.verdict == ("fail" if unknown else "pass")


def test_a_candidate_with_nan_fails_there() -> None:
    model = llama(LAYERS)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_submodule("model.layers.2.self_attn.k_proj").weight[3, 3] = float("nan")
    result = judged(model, broken)
    assert result.verdict == "fail"
    assert result.first_divergence is not None and result.first_divergence.site == "layers.2.key"
    assert "NaN or Inf" in result.site("layers.2.key").reason
    assert result.site("layers.2.key").cand_nonfinite == 2 * 33 * 2  # the rotary embedding mixes two channels


def test_a_wrong_embedding_is_not_excused_as_propagated() -> None:
    model = llama(LAYERS)
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.get_submodule("model.embed_tokens").weight.mul_(torch.linspace(0.9, 1.1, 32))
    result = judged(model, wrong)
    assert result.first_divergence is not None and result.first_divergence.site == "layers.0.key"


def test_a_wrong_head_is_found_behind_clean_layers() -> None:
    model = llama(LAYERS)
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.get_submodule("lm_head").weight.mul_(1.05)
    result = judged(model, stored(wrong, "fp16"))
    assert result.first_divergence is not None and result.first_divergence.site == "output.logits"


def test_another_number_of_layers_fails_with_what_is_missing() -> None:
    result = judged(llama(4), llama(3))
    assert result.verdict == "fail"
    assert {u.site for u in result.unmatched} >= {"layers.3.key", "layers.3.value", "layers.3.hidden"}


def test_excluded_sites_do_not_count() -> None:
    model = llama(LAYERS)
    result = judged(model, faulty(model, 5), exclude=["layers.5.*", "output.*"])
    assert result.verdict == "pass"
    assert {u.state for u in result.unmatched} == {"excluded"}


def test_absolute_limits_judge_without_a_floor() -> None:
    model = llama(LAYERS)
    loose = Tolerance(policy="absolute", sites={"*": {"rel_l2": 0.5}})
    assert judged(model, faulty(model, 3), tolerance=loose).verdict == "pass"
    strict = parse_tolerance("layers.*.value:rel_l2=1e-3", loose)
    result = judged(model, faulty(model, 3), tolerance=strict)
    assert result.first_divergence is not None and result.first_divergence.site == "layers.3.value"
    assert result.site("layers.3.value").reason == "rel_l2 0.02 is above the limit 0.001"


def test_limits_that_apply_to_nothing_are_an_error() -> None:
    model = llama(LAYERS)
    mistyped = Tolerance(policy="absolute", sites={"layer.*.value": {"rel_l2": 1e-3}})
    with pytest.raises(ConfigurationError, match=r"no limit applies to any site .*'layer\.\*\.value'"):
        judged(model, faulty(model, 3), tolerance=mistyped)


def test_a_limit_on_the_introduced_error_is_judged_and_makes_replay_run() -> None:
    """Without it, all sites of the clean model pass cumulatively and replay is left out."""
    model = llama(LAYERS)
    candidate = copy.deepcopy(model)
    candidate.config._attn_implementation = "eager"
    assert all(s.introduced is None for s in judged(model, candidate).sites)
    strict = Tolerance(sites={"layers.4.hidden": {"introduced": 1e-12}})
    result = judged(model, candidate, tolerance=strict)
    assert result.first_divergence is not None and result.first_divergence.site == "layers.4.hidden"
    assert result.site("layers.4.hidden").reason.endswith("is above the limit 1e-12")
    unanswered = judged(model, candidate, tolerance=strict, replay="never")
    assert unanswered.verdict == "error"
    assert unanswered.site("layers.4.hidden").reason == (
        "introduced has a limit (1e-12) and no value here: the site was not replayed"
    )


def test_patterns_of_tolerances_and_exclusions_that_match_no_site_are_said() -> None:
    model = llama(LAYERS)
    tolerance = Tolerance(sites={"layers.*.kye": {"mse": 1e-5}, "layers.*.key": {"mse": 1e-5}})
    result = judged(model, model, tolerance=tolerance, exclude=["layers.9.*"])
    assert [note for note in result.notes if "matches it" in note] == [
        "the pattern 'layers.9.*' excludes nothing: no site matches it",
        "the tolerance of 'layers.*.kye' applies to nothing: no site of the reference matches it",
    ]


def repeated(run: dict[str, Tensor], times: int = 3) -> dict[str, Tensor]:
    """The same tensors with every key and value head repeated, as grouped queries unrolled have them."""
    return {
        site: t.repeat_interleave(times, 1) if site.endswith(("key", "value")) else t.clone()
        for site, t in run.items()
    }


@pytest.fixture
def grouped() -> dict[str, Tensor]:
    """Three key/value heads in each of two layers."""
    seed = torch.Generator().manual_seed(0)
    run = {
        f"layers.{i}.{t}": torch.randn(1, 3, 7, 5, generator=seed) for i in (0, 1) for t in ("key", "value")
    }
    return run | {f"layers.{i}.hidden": torch.randn(1, 7, 12, generator=seed) for i in (0, 1)}


LIMITS = Tolerance("absolute", sites={"*": {"rel_l2": 1e-3}})


def against(reference: dict[str, Tensor], candidate: dict[str, Tensor]) -> Comparison:
    cand = FakeProbe(candidate)
    return judged(FakeProbe(reference), cand, {"x": torch.zeros(1)}, tolerance=LIMITS, replay="never")


def test_heads_repeated_equally_are_compared_once(grouped: dict[str, Tensor]) -> None:
    grouped["layers.0.key"][0, 0, 0, 0] = float("nan")  # which is equal to itself here
    result = against(grouped, repeated(grouped))
    assert (result.verdict, result.reason) == ("pass", "all 6 sites are equal to the bit")
    assert (
        result.site("layers.0.key").layout == "key/value heads repeated 3 times, the first of each compared"
    )


@pytest.mark.parametrize("repeat", [0, 1, 2])
@pytest.mark.parametrize("fault", [1.02, float("nan")])
def test_a_fault_in_any_repeat_of_a_head_is_seen(
    repeat: int, fault: float, grouped: dict[str, Tensor]
) -> None:
    candidate = repeated(grouped)
    candidate["layers.1.key"][:, 3 + repeat] *= fault  # one of those that repeat head 1
    result = against(grouped, candidate)
    assert result.first_divergence is not None and result.first_divergence.site == "layers.1.key"
    assert f"not equally: repeat {repeat + 1} of each compared" in result.site("layers.1.key").layout
    assert any(
        note.startswith("layers.1.key: the 3 repeats of its heads are not equal") for note in result.notes
    )
    assert [s.verdict for s in result.sites].count("fail") == 1


def test_repeats_that_differ_within_the_limits_pass_and_are_said(grouped: dict[str, Tensor]) -> None:
    candidate = repeated(grouped)
    candidate["layers.0.value"][:, 8] *= 1 + 1e-4
    result = against(grouped, candidate)
    assert result.verdict == "pass"
    assert "not equally: repeat 3" in result.site("layers.0.value").layout
    assert 0 < (result.site("layers.0.value").rel_l2 or 0) < 1e-4


def test_a_fault_in_keys_that_one_output_stacks_is_found_in_its_stack_and_layer() -> None:
    seed = torch.Generator().manual_seed(0)
    run = {
        f"{stack}.layers.{i}.{tensor}": torch.randn(*shape, generator=seed)
        for stack in ("encoder", "decoder")
        for i in (0, 1, 2)
        for tensor, shape in (("key", (1, 4, 7, 5)), ("hidden", (1, 7, 20)))
    }
    candidate = {site: t.clone() for site, t in run.items() if site.endswith("hidden")}
    for stack in ("encoder", "decoder"):
        keys = torch.stack([run[f"{stack}.layers.{i}.key"] for i in (0, 1, 2)], 1)
        candidate[f"output.{stack}_keys"] = keys
    assert against(run, candidate).reason == "all 12 sites are equal to the bit"
    candidate["output.decoder_keys"][:, 1] *= 1.02
    result = against(run, candidate)
    assert [s.site for s in result.sites if s.verdict == "fail"] == ["decoder.layers.1.key"]
    assert result.site("decoder.layers.1.key").found_cand == "given"


def test_a_capture_is_a_source_like_any_other(tmp_path: Path) -> None:
    model, inputs = llama(LAYERS), inputs_for("llama", tokens=33)
    path = tmp_path / "cand.capture"
    record(PyTorchProbe(faulty(model, 2)), inputs, path, detail=False, progress=silent)
    result = judged(model, path, inputs)
    assert result.first_divergence is not None and result.first_divergence.site == "layers.2.value"
    with pytest.raises(InputError, match="was recorded on inputs [0-9a-f]+ and these are"):
        judged(model, path, inputs_for("llama", tokens=20))


@pytest.mark.parametrize("keep", [False, True])
def test_captures_alone_need_no_inputs(tmp_path: Path, keep: bool) -> None:
    model, inputs = llama(LAYERS), inputs_for("llama", tokens=12)
    inputs["attention_mask"][0, :5] = 0
    paths = [tmp_path / f"{name}.capture" for name in ("ref", "same", "faulty", "elsewhere")]
    runs = (
        (model, inputs),
        (model, inputs),
        (faulty(model, 2), inputs),
        (model, inputs_for("llama", tokens=9)),
    )
    for path, (run, given) in zip(paths, runs, strict=True):
        record(PyTorchProbe(run), given, path, detail=False, progress=silent)
    ref, same, wrong, elsewhere = paths
    kept = tmp_path / "kept" if keep else None
    assert compare(ref, same, config=Config(), keep=kept).verdict == "pass"
    result = compare(ref, wrong, config=Config(), keep=kept, tolerance="rel_l2=1e-3")
    assert result.first_divergence is not None and result.first_divergence.site == "layers.2.value"
    assert result.environment["inputs_digest"] == open_capture(ref).inputs_digest
    assert "inputs" not in result.environment
    if kept is not None:
        assert open_capture(kept / "reference.capture").mask("") is not None
        assert open_capture(kept / "candidate.capture").inputs_digest == open_capture(ref).inputs_digest
    refused = r"elsewhere.capture: was recorded on inputs \w+ and the reference on \w+; record both"
    with pytest.raises(InputError, match=refused):
        compare(ref, elsewhere, config=Config())
    with pytest.raises(InputError, match=refused):
        compare(ref, wrong, config=Config(), floor=elsewhere)
    with pytest.raises(InputError, match="no inputs: give --inputs FILE"):
        compare(ref, model, config=Config())


def test_without_a_reference_that_runs_there_is_no_floor_and_no_silent_pass(tmp_path: Path) -> None:
    model, inputs = llama(LAYERS), inputs_for("llama", tokens=33)
    path = tmp_path / "ref.capture"
    record(PyTorchProbe(model), inputs, path, detail=False, progress=silent)
    with pytest.raises(ConfigurationError, match="only a PyTorch reference can be run"):
        judged(path, stored(model, "fp16"), inputs)
    given = judged(path, stored(model, "fp16"), inputs, floor=stored(model, "fp16"))
    assert given.verdict == "pass" and given.policy.floor_from == "given: pytorch"


def test_the_same_comparison_twice_gives_the_same_report_but_for_times() -> None:
    model = llama(LAYERS)
    one, two = (json.loads(judged(model, stored(faulty(model, 3), "fp16")).to_json()) for _ in range(2))
    for report in (one, two):
        assert report["environment"].pop("seconds") > 0
        assert report["environment"].pop("date")
    assert one == two


class Projected(nn.Module):
    """Projects what it is given, in the precision that it is given in, or after it `casts` to its own."""

    def __init__(self, *, casts: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.casts = casts
        self.first = nn.Linear(16, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 3).layers

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.to(self.first.weight.dtype) if self.casts else x)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_model_that_takes_other_floats_is_given_those_as_a_graph_is(precision: str) -> None:
    given = {"x": torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(2))}
    model, name = Projected().eval(), {"fp16": "float16", "bf16": "bfloat16"}[precision]
    note = f"Input x was converted from float32 to {name}, as the parameters are."
    result = judged(model, stored(model, precision), given)
    assert (result.verdict, result.notes) == ("pass", (note,)), result.reason
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.layers[1].linear2.weight.mul_(1.5)
    result = judged(stored(model, precision), stored(wrong, precision), given)
    assert result.first_divergence is not None and result.first_divergence.site == "layers.1.hidden"
    assert result.causes[0].id == "weight_scale"


def test_a_model_that_casts_itself_is_given_what_there_is() -> None:
    given = {"x": torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(2))}
    model = Projected(casts=True).eval()
    result = judged(model, stored(model, "bf16"), given)
    assert (result.verdict, result.notes) == ("pass", ())


def test_a_model_that_takes_no_floats_of_its_own_either_says_what_it_said_first() -> None:
    given = {"x": torch.randn(2, 9, 15)}
    with pytest.raises(SourceError, match=r"on inputs x float32\[2, 9, 15\]; check their dtypes and shapes"):
        judged(stored(Projected(), "bf16"), Projected(), given)


def test_two_candidates_in_one_process_do_not_disturb_each_other() -> None:
    model = llama(LAYERS)
    alone = judged(model, faulty(model, 1)).sites
    judged(model, stored(model, "bf16"))
    assert judged(model, faulty(model, 1)).sites == alone


def test_assert_close_names_site_and_figures() -> None:
    model = llama(LAYERS)
    assert divergence.assert_close(model, model, inputs_for("llama"), config=Config()).verdict == "pass"
    with pytest.raises(
        AssertionError,
        match=r"^layers\.3\.value fails: layer 3, tensor value\nintroduces an error of 2\.0e-2, [\d.e+]+x",
    ):
        divergence.assert_close(model, faulty(model, 3), inputs_for("llama"), config=Config())


def test_several_calls_of_a_layer_are_replayed_each_on_its_own_cache() -> None:
    class Unrolled(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: Tensor) -> Any:
            first = self.inner(input_ids=input_ids[:, :20], use_cache=True)
            second = self.inner(input_ids=input_ids[:, 20:], past_key_values=first.past_key_values)
            return second.logits

    model, inputs = llama(LAYERS), {"input_ids": inputs_for("llama", tokens=33)["input_ids"]}
    clean = judged(Unrolled(model), Unrolled(stored(model, "fp16")), inputs)
    assert clean.verdict == "pass", clean.reason
    assert clean.site("layers.2.key@2").introduced is not None
    result = judged(Unrolled(model), Unrolled(stored(faulty(model, 2), "fp16")), inputs)
    assert result.first_divergence is not None and result.first_divergence.site == "layers.2.value"


def test_a_second_stack_is_replayed_on_what_the_first_one_gave_it() -> None:
    model = MODELS["t5"]()
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.get_submodule("encoder.block.1.layer.0.SelfAttention.v").weight.mul_(1.02)
    result = judged(model, stored(wrong, "fp16"), inputs_for("t5", tokens=17))
    assert result.first_divergence is not None
    assert result.first_divergence.site == "encoder.layers.1.value"


def test_keys_that_the_model_returns_are_those_of_its_layers() -> None:
    """What a model hands on from its layers is no error of its own, and was judged there."""
    model, inputs = (
        DemoDecoder(DemoConfig(layers=16)),
        {"input_ids": inputs_for("llama", tokens=33)["input_ids"]},
    )
    clean = judged(model, stored(model, "fp16"), inputs)
    assert clean.verdict == "pass", clean.reason
    assert (clean.site("output.keys").rel_l2 or 0.0) > 4 * 2.0**-12, "within the floor of storing them once"
    assert clean.site("output.keys").introduced == 0.0
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.get_parameter("layers.5.self_attn.k_proj.weight").mul_(1.1)
    result = judged(model, stored(wrong, "fp16"), inputs)
    assert result.first_divergence is not None and result.first_divergence.site == "layers.5.key"
    assert result.site("output.keys").verdict == "pass"
    assert result.site("output.keys").reason.startswith("propagated")


def test_a_fault_beside_a_massive_activation_does_not_hide_below_its_rounding() -> None:
    model = llama(LAYERS)
    with torch.no_grad():
        model.get_submodule("model.embed_tokens").weight[:, 7] = 4000.0
        for layer in range(LAYERS):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                gain = model.get_submodule(f"model.layers.{layer}.{norm}").weight
                gain.fill_(4000.0 / 32**0.5)
                gain[7] = 0.0
    clean = judged(model, stored(model, "bf16"))
    assert clean.verdict == "pass", clean.reason
    wrong = faulty(model, 3, "o_proj", 2.0)
    result = judged(model, stored(wrong, "bf16"))
    assert result.first_divergence is not None and result.first_divergence.site == "layers.3.hidden"
    site = result.site("layers.3.hidden")
    assert (site.introduced or 0.0) < 4 * (site.introduced_floor or 0.0), "seen without the channels too"


def test_zero_keys_are_compared_although_their_heads_are_all_alike() -> None:
    model = llama(LAYERS)
    result = judged(model, faulty(model, 3, "k_proj", 0.0))
    assert result.first_divergence is not None and result.first_divergence.site == "layers.3.key"
    assert not result.unmatched
