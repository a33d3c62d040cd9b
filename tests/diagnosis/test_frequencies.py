"""Rotary embeddings whose frequencies, or whose positions in some rows alone, are others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.diagnosis.faults import diagnosed, planted, rotary
from tests.models import inputs_for, llama

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # heads of 32


def llama3(inv_freq: Tensor, factor: float = 8.0, original: int = 32) -> Tensor:
    """The scaling of Llama 3: long waves slower by the factor, short ones as they are."""
    waves = 2 * torch.pi / inv_freq
    smooth = ((original / waves - 1) / 3).clamp(0, 1)
    return (1 - smooth) * inv_freq / factor + smooth * inv_freq


@pytest.mark.parametrize("left_out", [True, False])
def test_a_scaling_of_some_frequencies_is_named(left_out: bool) -> None:
    plain: Any = llama(3, **SIZES)
    scaled: Any = planted(llama(3, **SIZES), rotary(lambda p, f: p * llama3(f)))
    reference, candidate = (scaled, plain) if left_out else (plain, scaled)
    found = diagnosed(reference, candidate, inputs_for("llama", tokens=64)).causes[0]
    assert (found.id, found.site) == ("rope_position", "layers.0.key")
    assert found.explained is not None
    assert found.explained > 0.999
    expected = llama3(plain.model.rotary_emb.inv_freq) / plain.model.rotary_emb.inv_freq
    factors = torch.tensor(found.parameters["factors"])
    torch.testing.assert_close(factors, 1 / expected if left_out else expected, rtol=1e-3, atol=0)


def test_cosines_and_sines_of_another_size_are_named_with_it() -> None:
    """As YaRN scales attention."""
    model = llama(3, **SIZES)

    def yarn(made: Any) -> None:
        rotary(lambda p, f: p * llama3(f))(made)
        forward = made.model.rotary_emb.forward
        made.model.rotary_emb.forward = lambda *a, **k: tuple(1.2 * t for t in forward(*a, **k))

    found = diagnosed(model, planted(model, yarn), inputs_for("llama", tokens=64)).causes[0]
    assert found.id == "rope_position"
    assert found.parameters["amplitude"] == pytest.approx(1.2, rel=1e-3)
    assert "1.2 times" in found.title


def test_positions_of_one_row_are_named() -> None:
    model = llama(3, **SIZES)
    moved = planted(model, rotary(lambda p, f: (p + torch.tensor([0.0, 3.0])[:, None, None]) * f))
    found = diagnosed(model, moved, inputs_for("llama", batch=2, tokens=32)).causes[0]
    assert (found.id, found.site) == ("rope_position", "layers.0.key")
    assert found.parameters["offsets"] == [0, 3]
    assert found.title == "the rotary embedding's positions are off in some rows of the batch: +3 in row 1"


def test_another_base_is_still_a_base() -> None:
    model = llama(3, **SIZES)
    other = planted(model, rotary(lambda p, f: p * f**1.2))
    assert diagnosed(model, other, inputs_for("llama", tokens=64)).causes[0].parameters[
        "base"
    ] == pytest.approx(10_000.0**1.2, rel=1e-2)


class From(nn.Module):
    """A model whose first token is at a far position."""

    def __init__(self, model: nn.Module, start: int) -> None:
        super().__init__()
        self.model, self.start = model, start

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = self.start + torch.arange(input_ids.shape[1])[None]
        logits: Tensor = self.model(input_ids=input_ids, position_ids=positions, use_cache=False).logits
        return logits


@pytest.mark.parametrize("start", [100, 200, 700, 1000, 5000])
@pytest.mark.parametrize("tokens", [8, 32])
def test_angles_are_read_back_at_far_positions(start: int, tokens: int) -> None:
    """Where the slowest frequencies have turned as well, sines may be larger than cosines."""
    model = llama(3, **SIZES)
    rounded = planted(model, rotary(lambda p, f: (p.bfloat16() * f.bfloat16()).bfloat16()))
    inputs = {"input_ids": inputs_for("llama", tokens=tokens)["input_ids"]}
    found = diagnosed(From(model, start), From(rounded, start), inputs).causes[0]
    assert (found.id, found.site) == ("rope_precision", "layers.0.key")
    assert found.explained is not None
    assert found.explained > 0.99


def bufferless(change: Callable[[Tensor, Tensor], Tensor] = lambda p, f: p * f) -> Any:
    """A model that keeps no frequencies: whoever asks for them has the angles alone."""
    model = llama(3, **SIZES)
    module = model.model.rotary_emb
    frequencies = module.inv_freq.clone()
    module._buffers.clear()

    def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = change(position_ids[:, :, None].float(), frequencies).float()
        both = torch.cat((angle, angle), -1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)

    module.forward = forward
    return model


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda p, f: (p + 1) * f, "rope_position"),
        (lambda p, f: p * f**1.1, "rope_position"),
        (lambda p, f: (p * f).bfloat16(), "rope_precision"),
    ],
)
@pytest.mark.parametrize("start", [12, 777])
def test_one_token_tells_enough_of_usual_frequencies(
    change: Callable[[Tensor, Tensor], Tensor], cause: str, start: int
) -> None:
    inputs = {"input_ids": inputs_for("llama", tokens=1)["input_ids"]}
    found = diagnosed(From(bufferless(), start), From(bufferless(change), start), inputs).causes[0]
    assert (found.id, found.site) == (cause, "layers.0.key")
    assert found.explained is not None
    assert found.explained > 0.99
