"""The catalogue: verdict, first layer and tensor, and cause of every pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from tests.faults.bench import PAIRS, Row, run, summary, table
from tests.faults.models import Decoder
from tests.faults.operators import Shape, accumulated, ten_bits
from tests.faults.pairs import Pair
from tests.faults.planting import Planted

CAUSES = {
    "weight_scale", "weight_permuted", "bias_missing", "kv_swapped", "layer_order", "weights_collapsed",
    "quant_int8", "quant_fp8", "weight_precision", "norm_eps", "norm_offset", "activation", "attention_scale",
    "softmax_precision", "mask_nan", "mask_leak", "mask_missing", "rope_precision", "rope_position",
    "rope_layout", "overflow_residual", "overflow_norm", "stale_kv", "accumulation_precision", "tf32",
    "dtype_misread", "unknown",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small take ten times as long on two threads of a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_the_verdict_and_the_first_divergence_are_true(pair: Pair) -> None:
    row = run(pair, diagnose=False)
    assert row.verdict_right, row.reason
    assert row.site_right, f"{row.site}, planted at {row.truth[0].site}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_nine_of_ten_causes_are_named_and_none_where_nothing_is_wrong() -> None:
    rows = [run(pair) for pair in PAIRS]
    assert not [row.pair for row in rows if not row.truth and row.causes]
    wrong = {row.pair: row.causes for row in rows if not row.cause_right}
    assert len(wrong) <= 0.1 * sum(bool(row.truth) for row in rows), wrong


def test_the_catalogue_covers_every_cause_and_enough_clean_pairs() -> None:
    truths = [pair.build(0).truth for pair in PAIRS]
    assert {planted.cause for truth in truths for planted in truth} == CAUSES
    assert sum(bool(truth) for truth in truths) >= 40
    assert sum(not truth for truth in truths) >= 12
    assert not [name for name, count in Counter(pair.name for pair in PAIRS).items() if count > 1]


def test_the_same_seed_gives_the_same_pair_and_another_seed_another() -> None:
    pair = next(pair for pair in PAIRS if pair.name == "value-heads")
    one, two, other = (pair.build(seed) for seed in (0, 0, 1))
    assert one.truth == two.truth
    assert torch.equal(one.inputs["input_ids"], two.inputs["input_ids"])
    assert all(
        torch.equal(a, b) for a, b in zip(one.reference.parameters(), two.reference.parameters(), strict=True)
    )
    assert not torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])


@pytest.mark.parametrize("style", ["llama", "gemma", "gpt2"])
def test_attention_written_out_and_fused_agree(style: str) -> None:
    """The decoder itself is sound: three ways to attend give one result, padding or not."""
    ids = torch.arange(24).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    kinds = ("explicit", "sdpa", "sdpa-causal")
    models = [Decoder(Shape(style=style, attention=kind, layers=2), 3) for kind in kinds]  # type: ignore[arg-type]
    for given in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        with torch.inference_mode():
            first, *others = (model(**given)["last_hidden_state"][0, 4:] for model in models)
        for other in others:
            torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-4)


def test_a_later_token_changes_nothing_before_it() -> None:
    model = Decoder(Shape(layers=2), 0)
    ids = torch.arange(16)[None]
    changed = ids.clone()
    changed[0, 10] = 99
    with torch.inference_mode():
        one, two = model(ids)["last_hidden_state"], model(changed)["last_hidden_state"]
    assert torch.equal(one[:, :10], two[:, :10])
    assert not torch.equal(one[:, 10:], two[:, 10:])


def test_rounding_to_ten_bits_is_exact_on_what_ten_bits_hold() -> None:
    """Against fp16, which has as many, within its normal range."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ten_bits(x), x.half().float())


def test_an_accumulator_of_many_bits_is_a_matrix_product() -> None:
    x, weight = torch.randn(5, 32), torch.randn(7, 32)
    torch.testing.assert_close(accumulated(x, weight, torch.float32, 4), x @ weight.T)
    rough = accumulated(x, weight, torch.float16, 1).float() - x @ weight.T
    assert 1e-4 < float(rough.abs().max()) < 0.1


def test_the_table_says_what_is_wrong() -> None:
    """A benchmark that cannot show a wrong answer is worth nothing."""
    planted = (Planted("layers.2.value", "weight_scale"), Planted("layers.7.key", "quant_fp8"))
    right = Row("a", 0, planted, "fail", "layers.2.value", {p.site: p.cause for p in planted}, 0.999, "", 1.0)
    half = Row("b", 0, planted, "fail", "layers.2.value", {"layers.2.value": "weight_scale"}, 0.9, "", 1.0)
    wrong = Row("c", 0, (), "fail", "layers.0.key", {"layers.0.key": "tf32"}, None, "", 1.0)
    assert right.cause_right and not half.cause_right and not wrong.cause_right
    assert not wrong.verdict_right and not wrong.site_right
    text = table([right, half, wrong])
    assert (
        "| b | weight_scale, quant_fp8 | layers.2.value, layers.7.key | yes | yes | **no** weight_scale |"
        in text
    )
    assert "| c | nothing |  | **no** | **no** layers.0.key | **no** tf32 |" in text
    assert "| cause, of the faulty pairs | 1 of 2 (50.0 %) |" in summary([right, half, wrong])
