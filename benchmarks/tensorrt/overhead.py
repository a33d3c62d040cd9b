"""What `divergence compare` costs beside what it contains, on an engine of any size.

    python benchmarks/tensorrt/overhead.py --size full --plan /tmp/case/full-fp16.plan --work /tmp/case

Side by side, each as a whole process after one to warm up: a plain program that makes the reference,
runs it once, loads the plan and runs it once; and the command.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLAIN = """
import sys
import torch
from benchmarks.tensorrt import gemma
import tensorrt as trt
size, plan = sys.argv[1:]
given = gemma.inputs(size)
moved = {n: t.cuda() for n, t in given.items()}
model = gemma.make(size)
with torch.inference_mode():
    model(**moved)
logger = trt.Logger(trt.Logger.ERROR)
engine = trt.Runtime(logger).deserialize_cuda_engine(open(plan, "rb").read())
context = engine.create_execution_context()
types = {trt.float32: torch.float32, trt.float16: torch.float16, trt.int64: torch.int64}
held = []
for i in range(engine.num_io_tensors):
    name = engine.get_tensor_name(i)
    dtype = types[engine.get_tensor_dtype(name)]
    tensor = moved[name].to(dtype) if name in moved else torch.empty(
        tuple(engine.get_tensor_shape(name)), dtype=dtype, device="cuda")
    held.append(tensor)
    context.set_tensor_address(name, tensor.data_ptr())
stream = torch.cuda.Stream()
context.execute_async_v3(stream.cuda_stream)
torch.cuda.synchronize()
"""


def main() -> None:
    """Runs both in turn and prints the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["small", "full"], default="small")
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where the inputs go")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from safetensors.torch import save_file

    from benchmarks.tensorrt import gemma

    inputs = args.work / f"{args.size}-inputs.safetensors"
    save_file(gemma.inputs(args.size), inputs)
    model = f"pytorch:{ROOT}/benchmarks/tensorrt/gemma.py:{args.size}"
    command = ["compare", "--ref", model, "--cand", str(args.plan), "--inputs", str(inputs)]
    program = ["-c", "from divergence.cli import main; main()", *command]
    compiled = args.work / "compiled"
    plain = [seconds(["-c", PLAIN, args.size, str(args.plan)], compiled) for _ in range(args.runs + 1)][1:]
    ours = [seconds(program, compiled) for _ in range(args.runs + 1)][1:]
    print(f"plain program        {statistics.median(plain):6.1f} s  {plain}")
    print(f"divergence compare   {statistics.median(ours):6.1f} s  {ours}")
    print(f"overhead             {statistics.median(ours) - statistics.median(plain):6.1f} s")


def seconds(arguments: list[str], compiled: Path) -> float:
    """Wall clock of a Python process, which may end with the status of a failed comparison.

    Both sides keep their compiled modules in the folder `compiled`: where Python is installed read-only,
    every process would compile all it imports anew.
    """
    env = {**os.environ, "PYTHONPYCACHEPREFIX": str(compiled)}
    started = time.monotonic()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, check=False)
    if done.returncode not in (0, 1):
        sys.exit(done.stderr.decode()[-2000:])
    return round(time.monotonic() - started, 2)


if __name__ == "__main__":
    main()
