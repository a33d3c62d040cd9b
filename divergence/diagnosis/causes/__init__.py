"""The causes, one file each, in the order in which they are tried: cheapest and commonest first."""

from __future__ import annotations

from typing import Any

from divergence.diagnosis.causes import (
    activation,
    attention_scale,
    bias_missing,
    kv_swapped,
    norm_eps,
    norm_offset,
    weight_scale,
)

CAUSES: tuple[Any, ...] = (
    kv_swapped,
    bias_missing,
    norm_offset,
    activation,
    norm_eps,
    attention_scale,
    weight_scale,
)
