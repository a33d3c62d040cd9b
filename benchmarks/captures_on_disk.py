"""Compares two captures on disk that are larger than the memory allowed, against reading the disk.

    python benchmarks/captures_on_disk.py --gib 20

The captures are made first and deleted in the end; `--gib` is the size of each, `--folder` a place for both.
The system's cache is emptied of them before each reading. Budgets: half the disk's sequential rate, 1 GiB.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from divergence.probes import Observation, RunFacts
from divergence.recording import CaptureWriter
from divergence.sites import HIDDEN_AXES, Site

SHAPE = (1, 2048, 4096)
"""A hidden state in fp32: 32 MiB."""

BLOCK = 8 << 20
COMPARE = """
import sys
import resource
import threading
import time
from pathlib import Path
import torch
import divergence
from divergence.config import Config, parse_tolerance
stop, anonymous, most = threading.Event(), 0, 0
def held(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024
def watch():
    global anonymous, most
    while not stop.wait(0.01):
        anonymous, most = max(anonymous, held("RssAnon")), max(most, held("VmRSS"))
x = torch.ones(1, 64, 64)
divergence.compare_tensors(x, x)
before = held("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
watcher = threading.Thread(target=watch)
watcher.start()
config = Config()
started = time.perf_counter()
result = divergence.compare(
    sys.argv[1], sys.argv[2], {"x": torch.zeros(1)}, config=config, precision="fp32",
    tolerance=parse_tolerance("rel_l2=1e-2", config.tolerance))
seconds = time.perf_counter() - started
stop.set()
watcher.join()
assert result.verdict == "pass", result.reason
print(seconds, before, held("VmHWM"), anonymous, len(result.sites))
"""


def write(path: Path, tensors: int, shift: float) -> int:
    """A capture of `tensors` hidden states. Returns its size in bytes."""
    from divergence.inputs import digest

    base = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    with CaptureWriter(path) as writer:
        for layer in range(tensors):
            tensor = base.roll(layer, -1) * (1 + shift)
            writer(Observation(Site(layer, "hidden"), tensor, HIDDEN_AXES, "made"))
        writer.close(RunFacts("fake", path.name, "0", precision="fp32"), digest({"x": torch.zeros(1)}))
    return sum(file.stat().st_size for file in path.iterdir())


def forget(*captures: Path) -> None:
    """Empties the system's cache of the captures."""
    os.sync()
    for file in (f for capture in captures for f in capture.iterdir()):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(capture: Path) -> float:
    """Seconds to read a capture, file after file, in blocks of 8 MiB."""
    block = bytearray(BLOCK)
    started = time.perf_counter()
    for file in sorted(capture.iterdir()):
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(block):
                pass
    return time.perf_counter() - started


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, help="by default a temporary one")
    parser.add_argument("--runs", type=int, default=2)
    args = parser.parse_args()
    tensors = max(1, round(args.gib * 2**30 / (4 * SHAPE[1] * SHAPE[2])))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        ref, cand = Path(folder) / "ref.capture", Path(folder) / "cand.capture"
        size = write(ref, tensors, 0.0) + write(cand, tensors, 1e-4)
        print(f"2 x {size / 2**31:.1f} GiB, {tensors} sites, {torch.get_num_threads()} threads")
        for _ in range(args.runs):
            forget(ref, cand)
            rate = size / 2**30 / (read(ref) + read(cand))
            forget(ref, cand)
            command = [sys.executable, "-c", COMPARE, str(ref), str(cand)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr[-2000:])
            seconds, before, peak, anonymous, _ = map(float, done.stdout.split())
            ours = size / 2**30 / seconds
            print(
                f"disk {rate:.2f} GiB/s   compare {ours:.2f} GiB/s, {ours / rate:.2f} of it, {seconds:.1f} s "
                f"  resident at most {peak:.0f} MiB, {anonymous:.0f} of it anonymous; {before:.0f} before"
            )


if __name__ == "__main__":
    main()
