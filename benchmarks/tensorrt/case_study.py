"""The case study on a real GPU: one ONNX model, five engines, and what is said of each.

    python benchmarks/tensorrt/case_study.py --size small --work /tmp/case --out results

Prints, for every engine, the error of key, value and hidden at a few layers beside the noise floor and
their ratio, the verdict, the first divergence and the latency; writes the reports and the engines' own
words to --out. Needs TensorRT, a GPU, and for the full size 60 GB of disk.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks.tensorrt import gemma
from benchmarks.tensorrt.recorder import Recorder
from divergence.config import Config
from divergence.pipeline import compare
from divergence.probes.tensorrt.build import BuildOptions, build_engine
from divergence.probes.tensorrt.probe import TensorRTProbe
from divergence.probes.tensorrt.process import Worker
from divergence.probes.tensorrt.sidecar import beside
from divergence.reports.terminal import render

HEADER = 4096
SHOWN = (0, 1, 5, 10, 17)
ENGINES = {
    "fp32": ("fp32", "fp32"),
    "tf32": ("fp32", "tf32"),
    "fp16": ("fp32", "fp16"),
    "bf16": ("fp32", "bf16"),
    "typed_fp16": ("fp16", "typed"),
}
"""By name: the ONNX model's own precision, and what the engine is built in."""


def main() -> None:
    """Builds, compares, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(gemma.SIZES), default="small")
    parser.add_argument("--work", type=Path, required=True, help="where models and engines go")
    parser.add_argument("--out", type=Path, required=True, help="where results go")
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--record", type=Path, help="record the engines here, for tests without a device")
    parser.add_argument("--plain", action="store_true", help="also build engines without added outputs")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    given = gemma.inputs(args.size)
    models = {p: exported(args.size, p, given, args.work) for p in {ENGINES[e][0] for e in args.engines}}
    reference = gemma.make(args.size)
    print(f"fp16 in PyTorch, last layer: relative error {pytorch_fp16(args.size, reference, given):.2e}")
    forward = forward_seconds(reference, given)
    print(f"PyTorch fp32 forward: {forward * 1e3:.1f} ms", flush=True)
    for name in args.engines:
        try:
            one(name, args, models[ENGINES[name][0]], reference, given, forward)
        except Exception:  # the others are worth having
            traceback.print_exc()
        torch.cuda.empty_cache()


def exported(size: str, precision: str, given: dict[str, torch.Tensor], work: Path) -> Path:
    """The ONNX model in `precision`, exported unless it is there."""
    path = work / f"{size}-{precision}.onnx"
    if not path.exists():
        started = time.monotonic()
        model = gemma.make(size)
        gemma.export(gemma.halved(model) if precision == "fp16" else model, given, path)
        print(f"exported {path.name} in {time.monotonic() - started:.0f} s", flush=True)
    return path


def pytorch_fp16(size: str, reference: gemma.Stack, given: dict[str, torch.Tensor]) -> float:
    """Relative error of the last hidden states of the model in fp16, for scale."""
    model = gemma.halved(gemma.make(size))
    with torch.inference_mode():
        truth = reference(**{n: t.cuda() for n, t in given.items()})[2]
        half = model(**{n: t.cuda().half() if t.is_floating_point() else t.cuda() for n, t in given.items()})[
            2
        ]
    return float((half.float() - truth).norm() / truth.norm())


def forward_seconds(reference: gemma.Stack, given: dict[str, torch.Tensor]) -> float:
    """Median seconds of a plain forward."""
    moved = {n: t.cuda() for n, t in given.items()}
    taken = []
    for _ in range(6):
        torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.inference_mode():
            reference(**moved)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def one(
    name: str,
    args: argparse.Namespace,
    model: Path,
    reference: gemma.Stack,
    given: dict[str, torch.Tensor],
    forward: float,
) -> None:
    """Builds one engine and compares it."""
    plan = args.work / f"{args.size}-{name}.plan"
    sidecar = build_engine(
        model, plan, BuildOptions(precision=ENGINES[name][1], plain=args.plain), inputs=given
    )
    cand: object = str(plan)
    if args.record is not None and name not in ("fp32", "tf32"):  # tensors of these are large
        cand = TensorRTProbe(plan, runner=Recorder(Worker(), args.record / name))
        shutil.copy(beside(plan), args.record / name / "sidecar.json")
        (args.record / name / "head").write_bytes(plan.read_bytes()[:HEADER])
    started = time.monotonic()
    result = compare(reference, cand, given, config=Config(), command=f"case_study.py {args.size} {name}")
    wall = time.monotonic() - started
    facts = result.environment["candidate"]
    size = plan.stat().st_size / 2**30
    print(f"\n=== {name}: built in {sidecar.seconds:.0f} s, {size:.2f} GiB, {len(sidecar.outputs)} sites")
    print(f"{result.verdict.upper()}: {result.reason}")
    own = forward + facts["load_s"] + facts["latency_ms"] / 1e3
    print(
        f"latency {facts['latency_ms']:.2f} ms; compare took {wall:.1f} s, of which loading the plan "
        f"{facts['load_s']:.1f} s and one run of each {forward + facts['latency_ms'] / 1e3:.2f} s: "
        f"overhead {wall - own:.1f} s"
    )
    for line in table(result):
        print(line)
    for sentence in [*result.notes, *(i["sentence"] for i in result.contract.get("ignored", []))]:
        print(f"- {sentence}")
    stem = args.out / f"{args.size}-{name}"
    with gzip.open(f"{stem}.report.json.gz", "wt") as file:
        file.write(result.to_json())
    Path(f"{stem}.txt").write_text(render(result, width=120, color=False))
    sys.stdout.flush()


def table(result: Any) -> Iterator[str]:
    """Key, value and hidden at the layers shown: relative error, floor, ratio; introduced in brackets."""
    sites = {s.site: s for s in result.sites}
    for layer in SHOWN:
        cells = []
        for tensor in ("key", "value", "hidden"):
            site = sites.get(f"layers.{layer}.{tensor}")
            if site is None:
                continue
            added = f" [{site.introduced_ratio:.1f}x]" if site.introduced_ratio is not None else ""
            floor = f"{site.floor:.1e}" if site.floor is not None else "-"
            ratio = f"{site.ratio:.1f}x" if site.ratio is not None else "-"
            cells.append(f"{tensor} {site.rel_l2:.1e} / {floor} = {ratio}{added} max {site.max_abs:.3g}")
        if cells:
            yield f"  layer {layer:2}: " + " | ".join(cells)


if __name__ == "__main__":
    main()
