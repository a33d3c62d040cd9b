"""Records engines for the tests that have no device.

    python benchmarks/tensorrt/record.py --work /tmp/case --out recorded

For the bundled model's clean export and engines of it, writes what the worker answered (facts and the
engine inspector's text, as JSON) and the tensors that it wrote (safetensors), so that everything but
the run itself is tested elsewhere.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from divergence.demo import inputs, write_bundled
from divergence.probes import Progress, silent
from divergence.probes.tensorrt.build import BuildOptions, build_engine
from divergence.probes.tensorrt.options import EngineOptions
from divergence.probes.tensorrt.probe import TensorRTProbe
from divergence.probes.tensorrt.process import Worker
from divergence.probes.tensorrt.sidecar import beside

ENGINES = {
    "fp32": ("clean", "fp32"),
    "fp16": ("clean", "fp16"),
    "bf16": ("clean", "bf16"),
    "rotary": ("rotary-bf16", "fp32"),
}
HEADER = 4096


class Recorder:
    """A worker that keeps what it answered.

    Args:
        worker: the worker.
        folder: where to keep it.
    """

    def __init__(self, worker: Worker, folder: Path) -> None:
        self.worker = worker
        self.folder = folder

    def call(
        self, job: str, request: Mapping[str, Any], *, about: str, progress: Progress = silent
    ) -> dict[str, Any]:
        """See `Worker.call`."""
        answer = self.worker.call(job, request, about=about, progress=progress)
        name = f"{Path(request['plan']).stem}-{job.rpartition(':')[2]}"
        with gzip.open(self.folder / f"{name}.json.gz", "wt") as file:
            json.dump(answer, file)
        if "outputs" in request:
            shutil.copy(request["outputs"], self.folder / f"{name}.safetensors")
        return answer


def main() -> None:
    """Builds the engines and records them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where models and engines go")
    parser.add_argument("--out", type=Path, required=True, help="where recordings go")
    parser.add_argument("--tokens", type=int, default=160)
    args = parser.parse_args()
    for folder in (args.work, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    given = inputs(tokens=args.tokens)
    with Worker() as worker:
        for name, (fault, precision) in ENGINES.items():
            model = args.work / f"{fault}.onnx"
            if not model.exists():
                write_bundled(fault, model)
            plan = args.work / f"{name}.plan"
            build_engine(model, plan, BuildOptions(precision=precision), inputs=given)
            options = EngineOptions(hazards=True)
            probe = TensorRTProbe(plan, options=options, runner=Recorder(worker, args.out))
            probe.describe()
            probe.run(given, lambda _: None)
            shutil.copy(beside(plan), args.out)
            (args.out / f"{name}.head").write_bytes(plan.read_bytes()[:HEADER])


if __name__ == "__main__":
    main()
