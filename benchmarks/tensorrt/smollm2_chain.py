"""SmolLM2-135M on a real GPU: PyTorch, its ONNX export, and engines in fp16 and bf16, as one chain each.

    python benchmarks/tensorrt/smollm2_chain.py --work /tmp/smol --out results

Prefill of 256 tokens of a real prompt. Needs TensorRT, a GPU and the weights that `make setup` fetches.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from divergence.chain import compare_chain
from divergence.config import Config
from divergence.probes.tensorrt.build import BuildOptions, build_engine
from divergence.reports.chain import render_chain
from tests import smollm2

TOKENS = 256


def main() -> None:
    """Exports, builds, compares, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where models and engines go")
    parser.add_argument("--out", type=Path, required=True, help="where results go")
    parser.add_argument("--engines", nargs="*", default=["fp16", "bf16"])
    args = parser.parse_args()
    for folder in (args.work, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    model, given = smollm2.load(), smollm2.inputs(TOKENS)
    path = args.work / "smollm2.onnx"
    if not path.exists():
        smollm2.export(model, given, path)
    model.cuda()
    for precision in args.engines:
        try:
            plan = args.work / f"smollm2-{precision}.plan"
            sidecar = build_engine(path, plan, BuildOptions(precision=precision), inputs=given)
            print(f"{precision}: built in {sidecar.seconds:.0f} s, {len(sidecar.outputs)} sites", flush=True)
            started = time.monotonic()
            chain = compare_chain(model, [str(path), str(plan)], given, config=Config())
            print(f"chain compared in {time.monotonic() - started:.1f} s")
            text = render_chain(chain, width=120, color=False)
            print(text, flush=True)
            (args.out / f"smollm2-{precision}.txt").write_text(text)
            with gzip.open(args.out / f"smollm2-{precision}.report.json.gz", "wt") as file:
                file.write(chain.to_json())
        except Exception:  # the other engine is worth having
            traceback.print_exc()


if __name__ == "__main__":
    main()
