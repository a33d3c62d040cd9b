"""What pairs cost here, one after another, and on a local Ray of two workers.

Candidates and samples of a decoder of 12 layers and hidden size 512, 256 tokens; two candidates of four
are faulty and diagnosed. On Ray the plan of `divergence.on_ray` (at least two tasks a worker) stands beside
a task for every pair, whose reference runs as often as there are pairs. Times are whole calls on a machine
with two cores or more, one thread each; a Ray is started once, and the time that takes is told apart.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from divergence import Pairs, on_ray
from divergence.config import Config
from divergence.demo import inputs
from divergence.pairs import compare_pairs
from divergence.probes import silent

WORKERS = 2
TOKENS = 256
SHAPES = ((4, 6), (24, 1))
"""Candidates and samples: 24 pairs each."""

MODEL = """
import torch
from divergence.demo import DemoConfig, DemoDecoder

def load():
    return DemoDecoder(DemoConfig(layers=12, hidden=512, query_heads=8, kv_heads=4, head_dim=64, mlp=1536))

def scaled():
    model = load()
    with torch.no_grad():
        model.layers[5].self_attn.v_proj.weight.mul_(1.02)
    return model
"""


def main() -> None:
    """Prints seconds and runs of the reference."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.py"
        file.write_text(MODEL)
        _compared(file, 2, 1, None)  # compiles what the comparison needs
        serial = {shape: _compared(file, *shape, None) for shape in SHAPES}
        started = time.perf_counter()
        with on_ray._cluster(f"local:{WORKERS}", silent):  # noqa: SLF001 (one Ray for all)
            _compared(file, 2, 1, "local")
            print(f"starting Ray and its workers: {time.perf_counter() - started:.1f} s\n")
            usual = on_ray.TASKS_PER_WORKER
            print(f"{'candidates x samples':22} {'way':22} {'s':>6} {'reference runs':>15}")
            for shape in SHAPES:
                _line(shape, "here", serial[shape], shape[1])
                for name, tasks in (("Ray", usual), ("Ray, a task a pair", 1000)):
                    on_ray.TASKS_PER_WORKER = tasks
                    found = _compared(file, *shape, "local")
                    on_ray.TASKS_PER_WORKER = usual
                    _line(shape, name, found, found.environment["ray"]["tasks"])


def _compared(file: Path, cands: int, samples: int, address: str | None) -> Pairs:
    given = [inputs(tokens=TOKENS - 8 * i) for i in range(samples)]
    sources = [f"pytorch:{file}:{'scaled' if i % 2 else 'load'}" for i in range(cands)]
    found = compare_pairs(f"pytorch:{file}:load", sources, given, ray=address, config=Config())
    failing = sum(pair.comparison.verdict == "fail" for pair in found.pairs)
    assert (found.verdict, failing) == ("fail", cands // 2 * samples), found.reason
    return found


def _line(shape: tuple[int, int], way: str, found: Pairs, runs: int) -> None:
    print(f"{shape[0]:>3} x {shape[1]:<16} {way:22} {found.environment['seconds']:6.1f} {runs:15}")


if __name__ == "__main__":
    main()
