"""Draws a report as the terminal shows it: `python docs/render_report.py report.json picture.svg`."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from divergence.reports.terminal import render
from divergence.result import Comparison

WIDTH = 112

if __name__ == "__main__":
    report, picture = map(Path, sys.argv[1:])
    text = render(Comparison.from_json(report.read_text(encoding="utf-8")), width=WIDTH, color=True)
    shown = text.split("\nRun\n")[0].split("\n\x1b[1mRun\x1b[0m")[0]
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text.from_ansi(shown))
    svg = console.export_svg(title="divergence compare --ref pytorch --cand model.onnx")
    # The fonts of the reader's machine: a picture that loads something is no picture.
    svg = re.sub(r"@font-face \{.*?\}\n", "", svg, flags=re.DOTALL)
    picture.write_text(svg.replace("Fira Code", "monospace"), encoding="utf-8")
