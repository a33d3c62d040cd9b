"""How the time of a comparison grows with layers, tokens, width and the size of one tensor.

Two copies of one model run in PyTorch, so that nothing but the comparison varies: a clean pair, whose floor
need not be measured, and one with a planted fault, which is measured, replayed and diagnosed. Beside each
stands the plain forward pass that it contains twice.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.support.measure import median_seconds
from divergence.comparison import compare_tensors
from divergence.config import Config
from divergence.demo import DemoConfig, DemoDecoder, inputs
from divergence.pipeline import compare

RUNS = 3
BASE = DemoConfig(layers=6, hidden=256, query_heads=8, mlp=512)
TOKENS = 256
GAIN = 1.05


def models() -> Iterator[tuple[str, DemoConfig, int]]:
    """What varies, the model's sizes, and the tokens."""
    for layers in (6, 12, 24, 48):
        yield f"layers {layers}", replace(BASE, layers=layers), TOKENS
    for tokens in (128, 256, 512, 1024):
        yield f"tokens {tokens}", BASE, tokens
    for width in (128, 256, 512, 1024):
        yield f"hidden {width}", replace(BASE, hidden=width, query_heads=width // 32, mlp=2 * width), TOKENS


def of_models() -> None:
    """Prints the table of models."""
    print(f"{'':14} {'forward':>9} {'clean':>9} {'faulty':>9} {'clean / 2 forwards':>19}   milliseconds")
    for name, config, tokens in models():
        model, clean, faulty = (DemoDecoder(config).eval() for _ in range(3))
        with torch.no_grad():
            faulty.get_submodule(f"layers.{config.layers // 2}.self_attn.v_proj").weight.mul_(GAIN)  # type: ignore[operator]  # a parameter
            # Equal bits would end the comparison early.
            clean.get_submodule("layers.0.mlp.down_proj").weight.mul_(1 + 2e-7)  # type: ignore[operator]
        given = inputs(tokens=tokens)

        def plain(model: Any = model, given: Any = given) -> None:
            with torch.inference_mode():
                model(**given)

        def pair(cand: Any, verdict: str, model: Any = model, given: Any = given) -> None:
            result = compare(model, cand, given, config=Config(), precision="fp32")
            assert result.verdict == verdict, result.reason

        forward = median_seconds(plain, RUNS)
        passes = median_seconds(lambda clean=clean: pair(clean, "pass"), RUNS)  # type: ignore[misc]
        fails = median_seconds(lambda faulty=faulty: pair(faulty, "fail"), RUNS)  # type: ignore[misc]
        row = f"{forward * 1e3:9.1f} {passes * 1e3:9.1f} {fails * 1e3:9.1f} {passes / forward / 2:19.1f}"
        print(f"{name:14} {row}", flush=True)


def of_tensors() -> None:
    """Prints the table of single tensors."""
    print(f"\n{'MiB a side':>12} {'milliseconds':>14} {'GB/s':>8}")
    for mib in (1, 4, 16, 64, 256):
        ref = torch.randn(1, mib * 64, 4096, generator=torch.Generator().manual_seed(0))
        cand = ref + 1e-3
        took = median_seconds(lambda ref=ref, cand=cand: compare_tensors(ref, cand), 7)  # type: ignore[misc]
        print(f"{mib:12} {took * 1e3:14.2f} {2 * mib * 2**20 / took / 1e9:8.1f}", flush=True)


if __name__ == "__main__":
    print(f"{torch.get_num_threads()} threads, median of {RUNS} runs")
    of_models()
    of_tensors()
