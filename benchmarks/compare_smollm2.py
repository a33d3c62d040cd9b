"""Compare on SmolLM2-135M against the two plain forward passes that it contains, in one run."""

from __future__ import annotations

import functools
import resource
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.support.measure import median_seconds
from tests import smollm2

RUNS = 3
TOKENS = 128


def peak(work: Callable[[], Any]) -> float:
    """Peak resident memory during `work` over that before it, in MiB."""
    page = resource.getpagesize()
    high = before = resident(page)
    done = threading.Event()

    def watch() -> None:
        nonlocal high
        while not done.wait(0.005):
            high = max(high, resident(page))

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return (high - before) / 2**20


def resident(page: int) -> int:
    """Resident memory of this process in bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * page


def main() -> None:
    """Prints the table."""
    if not smollm2.available():
        print("no SmolLM2 in .models: run make setup")
        return
    import onnxruntime
    import torch

    from divergence.config import Config
    from divergence.pipeline import compare

    model, inputs = smollm2.load(), smollm2.inputs(TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        path = smollm2.export(model, inputs, Path(folder) / "model.onnx")

        def session() -> Any:
            return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def plain_torch() -> None:
            with torch.inference_mode():
                model(**inputs)

        def plain_onnx(held: Any) -> None:
            names = [i.name for i in held.get_inputs()]
            held.run(None, {name: inputs[name].numpy() for name in names})

        def job() -> None:
            assert compare(model, path, inputs, config=Config()).verdict == "pass"

        def both() -> None:
            plain_torch()
            plain_onnx(session())

        held = session()
        rows = {
            "PyTorch forward": median_seconds(plain_torch, RUNS),
            "onnxruntime: load": median_seconds(session, RUNS),
            "onnxruntime: run": median_seconds(functools.partial(plain_onnx, held), RUNS),
        }
        del held
        extra_plain = peak(both)
        plain = sum(rows.values())
        rows["plain, all three"] = plain
        rows["compare"] = median_seconds(job, RUNS)
        extra = peak(job)
    for name, value in rows.items():
        print(f"{name:20} {value:7.2f} s")
    print(f"compare / plain      {rows['compare'] / plain:7.2f}")
    print(f"peak memory          {extra_plain:7.0f} MiB plain, {extra:.0f} MiB compare")


if __name__ == "__main__":
    main()
