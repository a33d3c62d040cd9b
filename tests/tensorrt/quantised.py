"""Quantised exports of the bundled model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from divergence.demo import inputs

TYPES = {"int8": QuantType.QInt8, "fp8": QuantType.QFLOAT8E4M3FN}


class _Samples(CalibrationDataReader):  # type: ignore[misc]  # ships no types
    """The bundled inputs, once."""

    def __init__(self) -> None:
        self._samples: Iterator[dict[str, object]] = iter([{n: t.numpy() for n, t in inputs().items()}])

    def get_next(self) -> dict[str, object] | None:
        return next(self._samples, None)


def quantise(model: Path, path: Path, kind: str) -> Path:
    """Writes `model` with the inputs of its projections quantised, symmetrically and per tensor."""
    logging.getLogger().setLevel(logging.ERROR)  # it advises to optimise the model first
    quantize_static(
        model,
        path,
        _Samples(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Gemm"],
        activation_type=TYPES[kind],
        weight_type=TYPES[kind],
        calibrate_method=CalibrationMethod.Distribution if kind == "fp8" else CalibrationMethod.MinMax,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )
    return path
