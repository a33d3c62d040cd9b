"""Reports of real TensorRT engines, as `tests/data/tensorrt/reports/README.md` describes them."""

from __future__ import annotations

import gzip
from pathlib import Path

from divergence.chain_result import Chain
from divergence.result import Comparison

FOLDER = Path(__file__).parents[1] / "data" / "tensorrt" / "reports"
SMALL = ("small-fp32", "small-tf32", "small-fp16", "small-bf16", "small-typed_fp16")
PAIRS = (*SMALL, "full-fp16")
CHAIN = "smollm2-fp16"


def recorded(name: str) -> Comparison:
    """The report of one engine."""
    return Comparison.from_json(text(name), name)


def recorded_chain() -> Chain:
    """The report of SmolLM2's chain."""
    return Chain.from_json(text(CHAIN), CHAIN)


def text(name: str) -> str:
    """`report.json` of an engine."""
    with gzip.open(FOLDER / f"{name}.report.json.gz", "rt", encoding="utf-8") as file:
        return file.read()
