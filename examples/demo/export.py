"""Writes the candidate, model.onnx: `python export.py`, or with a fault, `python export.py rotary-bf16`."""

from __future__ import annotations

import sys

from divergence.demo import write_bundled

if __name__ == "__main__":
    write_bundled(sys.argv[1] if len(sys.argv) > 1 else "clean", "model.onnx")
