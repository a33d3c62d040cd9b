"""NaN and Inf: the first site in execution order, the operator, and the range before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.diagnosis.faults import diagnosed, layer, planted
from tests.models import MODELS, inputs_for


def test_minus_infinity_over_a_padded_row_is_found_where_it_arises() -> None:
    def infinite(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        scores = query @ key.transpose(2, 3) * kwargs["scaling"]
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril() & (torch.arange(scores.shape[-1]) >= 3)
        scores = scores + torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("infinite", infinite)
    reference = MODELS["llama-eager"]()
    candidate = planted(reference, lambda m: setattr(m.config, "_attn_implementation", "infinite"))
    inputs = inputs_for("llama", 1)
    inputs["attention_mask"][:, :3] = 0
    result = diagnosed(reference, candidate, inputs)
    cause = result.causes[0]
    assert cause.id == "mask_nan" and cause.explained == 1.0
    assert any("layers.0.hidden is the first site" in line for line in cause.evidence)
    assert any("padded tokens" in line for line in cause.evidence)


def test_a_residual_stream_beyond_fp16_is_named_with_its_range() -> None:
    def massive(model: Any) -> None:
        down = layer(model, 1).mlp.down_proj
        down.weight[7] *= 1e7

    reference = planted(MODELS["llama"](), massive)

    def halved(model: Any) -> None:
        inner = layer(model, 1)
        forward = inner.forward
        inner.forward = lambda *a, **k: forward(*a, **k).half().float()

    result = diagnosed(reference, planted(reference, halved), inputs_for("llama"))
    cause = result.causes[0]
    assert (cause.id, cause.site, cause.explained) == ("overflow_residual", "layers.1.hidden", 1.0)
    assert any("65504" in line for line in cause.evidence)
    assert any("its consumer saw it: layers.2.key" in line for line in cause.evidence)


def test_norm_statistics_beyond_fp16_are_named() -> None:
    class Narrow(nn.Module):
        def __init__(self, norm: Any) -> None:
            super().__init__()
            self.weight, self.eps = norm.weight, norm.variance_epsilon

        def forward(self, x: Tensor) -> Tensor:
            squares = (x.half() * x.half()).float()
            made: Tensor = self.weight * (x * torch.rsqrt(squares.mean(-1, keepdim=True) + self.eps))
            return made

    reference = planted(MODELS["llama"](), lambda m: m.model.embed_tokens.weight[:, 5].add_(900.0))

    def narrow(model: Any) -> None:
        layer(model, 1).post_attention_layernorm = Narrow(layer(model, 1).post_attention_layernorm)

    cause = diagnosed(reference, planted(reference, narrow), inputs_for("llama")).causes[0]
    assert cause.id == "overflow_norm" and cause.site == "layers.1.hidden"
    assert cause.explained is not None and cause.explained > 0.99


def test_nan_of_unknown_origin_is_unknown_with_its_place() -> None:
    def fault(model: Any) -> None:
        layer(model, 1).mlp.down_proj.weight[3, 4] = torch.nan

    reference = MODELS["llama"]()
    cause = diagnosed(reference, planted(reference, fault), inputs_for("llama")).causes[0]
    assert cause.id == "unknown" and cause.site == "layers.1.hidden"
    assert any("NaN" in line for line in cause.evidence)
