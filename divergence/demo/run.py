"""`divergence demo`: the main job on the bundled model."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

from divergence.working import check_writable


def run(out: Path | None) -> int:
    """Compares the bundled model with a clean ONNX export, and with one whose rotary angles are
    computed in bfloat16.

    Args:
        out: folder for both reports, in `clean/` and `rotary-bf16/`; None to keep none.

    Returns:
        Exit status: 0 if the first passes and the second fails at `layers.0.key`, else 1.
    """
    from divergence.config import Config
    from divergence.demo import inputs, load, write_bundled
    from divergence.pipeline import compare
    from divergence.reports import write_all
    from divergence.reports.progress import progress
    from divergence.reports.terminal import render

    if out is not None:
        check_writable(out)
    candidates = {
        "clean": "a clean export of the model",
        "rotary-bf16": "an export that computes its rotary angles in bfloat16",
    }
    found = {}
    with tempfile.TemporaryDirectory(prefix="divergence-demo-") as folder:
        for name, title in candidates.items():
            path = Path(folder) / f"{name}.onnx"
            with progress(sys.stderr, sys.stderr.isatty()) as shown:
                write_bundled(name, path)
                result = compare(
                    load(), path, inputs(), config=Config(), command="divergence demo", progress=shown
                )
            click.echo(f"PyTorch against {title}:\n")
            click.echo(render(result, color=sys.stdout.isatty()))
            if out is not None:
                write_all(result, out / name)
                click.echo(f"report: {out / name / 'report.html'}")
            click.echo("")
            found[name] = result
    first = found["rotary-bf16"].first_divergence
    right = found["clean"].verdict == "pass" and first is not None and first.site == "layers.0.key"
    click.echo(
        "As it should be: the clean export passes, and the planted fault is found at layers.0.key."
        if right
        else "Not as it should be: the clean export must pass, the fault be found at layers.0.key."
    )
    return 0 if right else 1
