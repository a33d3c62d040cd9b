"""Reports of real TensorRT engines, as `tests/data/tensorrt/reports/README.md` describes them."""

from __future__ import annotations

import gzip
from pathlib import Path

from divergence.chain_result import Chain
from divergence.result import Comparison

FOLDER = Path(__file__).parents[1] / "data" / "tensorrt" / "reports"
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "typed_fp16")
SMALL = tuple(f"small-{precision}" for precision in PRECISIONS)
FULL = tuple(f"full-{precision}" for precision in PRECISIONS)
PAIRS = (*SMALL, *FULL)
CHAINS = ("smollm2-fp16", "smollm2-bf16")


def recorded(name: str) -> Comparison:
    """The report of one engine."""
    return Comparison.from_json(text(name), name)


def recorded_chain(name: str = "smollm2-fp16") -> Chain:
    """The report of one of SmolLM2's chains."""
    return Chain.from_json(text(name), name)


def recorded_engine_of(name: str) -> Comparison:
    """The report of an engine: of a pair that was compared, or the last of a chain."""
    return recorded_chain(name).comparisons[-1] if name in CHAINS else recorded(name)


def text(name: str) -> str:
    """`report.json` of an engine."""
    with gzip.open(FOLDER / f"{name}.report.json.gz", "rt", encoding="utf-8") as file:
        return file.read()
