"""Makes the bundled graphs anew: `python -m divergence.demo.make_graphs`, after changing the model."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

import onnx

from divergence.demo.bundle import BUNDLED, strip
from divergence.demo.export import export


def make_graphs(folder: Path) -> None:
    """Exports every bundled model and writes its graph without weights to `folder/NAME.onnx.gz`.

    Raises:
        SourceError: the exporter is missing or failed, or its graph holds foreign weights.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for name, rotary_dtype in BUNDLED.items():
            whole = Path(scratch) / f"{name}.onnx"
            export(whole, rotary_dtype=rotary_dtype)
            graph = strip(onnx.load(whole)).SerializeToString()
            # No time stamp, so that an unchanged graph is an unchanged file.
            (folder / f"{name}.onnx.gz").write_bytes(gzip.compress(graph, mtime=0))


if __name__ == "__main__":
    make_graphs(Path(__file__).parent)
