"""Exports of the bundled model to ONNX, clean or with a fault planted."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor

from divergence.demo.model import DemoConfig, DemoDecoder, RotaryEmbedding
from divergence.errors import SourceError, one_line

INPUTS = ("input_ids", "attention_mask")
OUTPUTS = ("keys", "values", "logits")
TOKENS = 160


def load(*, dtype: torch.dtype = torch.float32, sdpa: bool = False) -> DemoDecoder:
    """The bundled model in evaluation mode; the same weights on every call.

    Args:
        dtype: of weights and activations. The rotary frequencies stay in fp32, as they must.
        sdpa: attention by `scaled_dot_product_attention` instead of written out.
    """
    model = DemoDecoder(sdpa=sdpa).eval().requires_grad_(False)
    exact = model.rotary.inv_freq
    model = model.to(dtype)
    model.rotary.inv_freq = exact
    return model


def inputs(batch: int = 1, tokens: int = TOKENS, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of the bundled model: random token ids and a mask without padding.

    Args:
        batch: sequences.
        tokens: length of each.
        seed: of the token ids; torch's global generator is not touched.

    Returns:
        `input_ids` and `attention_mask`, int64 `[batch, tokens]`.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(DemoConfig().vocabulary, (batch, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class LowPrecisionRotary(RotaryEmbedding):
    """The fault of the case that this tool exists for: positions, frequencies and angles rounded.

    Args:
        exact: the embedding to take the frequencies from.
        dtype: what position, frequency and their product are rounded to.
    """

    def __init__(self, exact: RotaryEmbedding, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.register_buffer("inv_freq", exact.inv_freq)
        self.dtype = dtype

    def angles(self, position_ids: Tensor) -> Tensor:
        """Angles in radians as a product in the low precision gives them, widened to fp32."""

        def rounded(x: Tensor) -> Tensor:
            return x.to(self.dtype).float()

        # In fp32 the product of two rounded factors is exact, so rounding it once is what a
        # multiplication in the low precision does; onnxruntime has no such kernel for bf16.
        return rounded(rounded(position_ids[:, :, None]) * rounded(self.inv_freq))


@contextlib.contextmanager
def planted(
    model: DemoDecoder,
    *,
    rotary_dtype: torch.dtype | None = None,
    value_gain: Mapping[int, float] | None = None,
) -> Iterator[DemoDecoder]:
    """Plants faults into `model` and takes them out again on leaving.

    Args:
        model: changed in place.
        rotary_dtype: compute the rotary angles in this precision.
        value_gain: factor by layer for the weights of its value projection.

    Raises:
        AttributeError: `value_gain` names a layer that the model has not.
    """
    rotary = model.rotary
    projections = {n: _value_projection(model, n) for n in value_gain or {}}
    kept = {n: p.weight.detach().clone() for n, p in projections.items()}
    try:
        if rotary_dtype is not None:
            model.rotary = LowPrecisionRotary(rotary, rotary_dtype)
        with torch.no_grad():
            for n, gain in (value_gain or {}).items():
                projections[n].weight.mul_(gain)
        yield model
    finally:
        model.rotary = rotary
        with torch.no_grad():
            for n, weight in kept.items():
                projections[n].weight.copy_(weight)


def export(
    path: str | os.PathLike[str],
    *,
    rotary_dtype: torch.dtype | None = None,
    value_gain: Mapping[int, float] | None = None,
    dtype: torch.dtype = torch.float32,
    sdpa: bool = False,
) -> None:
    """Exports the bundled model to one ONNX file of about 4 MB (fp32), for any batch and length.

    Args:
        path: file to write.
        rotary_dtype, value_gain: faults to plant, see `planted`.
        dtype, sdpa: see `load`. The CPU provider of onnxruntime does not run bfloat16.

    Raises:
        SourceError: the exporter is not installed or failed, or the file cannot be written.
    """
    model = load(dtype=dtype, sdpa=sdpa)
    example = inputs(batch=2)
    try:
        with planted(model, rotary_dtype=rotary_dtype, value_gain=value_gain), _quiet():
            batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
            torch.onnx.export(
                model,
                (),
                path,
                kwargs=example,
                input_names=INPUTS,
                output_names=OUTPUTS,
                dynamic_shapes={name: {0: batch, 1: tokens} for name in INPUTS},
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except ImportError as error:
        raise SourceError(
            f"the bundled model cannot be exported ({one_line(error)}); install onnxscript"
        ) from error
    except Exception as error:  # the exporter wraps whatever went wrong in types of its own
        raise SourceError(f"{path}: the bundled model cannot be exported ({one_line(error)})") from error


def _value_projection(model: DemoDecoder, layer: int) -> torch.nn.Linear:
    return cast(torch.nn.Linear, model.get_submodule(f"layers.{layer}.self_attn.v_proj"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's prints, warnings and log records from the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
