"""The causes, one file each."""

from __future__ import annotations

from divergence.diagnosis.causes import (
    accumulation_precision,
    activation,
    attention_scale,
    bias_missing,
    dtype_misread,
    kv_swapped,
    layer_order,
    mask_leak,
    mask_missing,
    mask_nan,
    norm_eps,
    norm_offset,
    observer_effect,
    overflow_norm,
    overflow_residual,
    quant_fp8,
    quant_int8,
    rope_layout,
    rope_position,
    rope_precision,
    softmax_precision,
    stale_kv,
    stream_hazard,
    tf32,
    weight_permuted,
    weight_precision,
    weight_scale,
    weights_collapsed,
)
from divergence.diagnosis.hypotheses import CauseModule, FactsCauseModule, ToldCauseModule

CAUSES: tuple[CauseModule, ...] = (
    mask_nan,
    overflow_residual,
    overflow_norm,
    kv_swapped,
    stale_kv,
    bias_missing,
    weights_collapsed,
    norm_offset,
    mask_missing,
    mask_leak,
    activation,
    norm_eps,
    rope_layout,
    rope_precision,
    rope_position,
    softmax_precision,
    attention_scale,
    weight_precision,
    quant_int8,
    quant_fp8,
    tf32,
    dtype_misread,
    layer_order,
    weight_scale,
    weight_permuted,
    accumulation_precision,
)
"""Those that are emulated, in the order in which they are tried: cheapest and commonest first."""

NONFINITE: tuple[CauseModule, ...] = (mask_nan, overflow_residual, overflow_norm)
"""Those that can make NaN or Inf."""

FROM_FACTS: tuple[FactsCauseModule, ...] = (stale_kv, accumulation_precision)
"""Those that facts of the case tell where no emulation explains it."""

TOLD: tuple[ToldCauseModule, ...] = (stream_hazard, observer_effect)
"""Those that the run tells: there is nothing to emulate."""
