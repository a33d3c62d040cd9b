"""The drawings of a comparison as files, to go into a document: PNG and SVG, each with its legend."""

from __future__ import annotations

from pathlib import Path

from divergence.reports.drawing import house_style, plots
from divergence.result import Comparison
from divergence.working import file_name

_DPI = 160
_UNDATED = {"Date": None}


def write_plots(comparison: Comparison, folder: Path) -> list[Path]:
    """Draws `comparison` into `folder`: `accumulation-key.png`, `.svg`, and so on.

    Plots that an earlier report left there and this one has not are removed.

    Returns:
        The files, in the order of the page; none where there is nothing to draw.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with house_style():
        for plot in plots(comparison, standalone=True):
            for ending in ("png", "svg"):
                path = folder / f"{file_name(plot.name)}.{ending}"
                metadata = _UNDATED if ending == "svg" else {}
                plot.figure.savefig(path, dpi=_DPI, facecolor="white", metadata=metadata)
                written.append(path)
    for old in {*folder.glob("*.png"), *folder.glob("*.svg")} - set(written):
        if old.stem.split("-")[0] in _KINDS:
            old.unlink()
    return written


_KINDS = ("accumulation", "range", "heads", "tokens", "spread")
