"""The same in a test suite: `pytest --divergence-report reports` in this folder, after `python export.py`."""

from __future__ import annotations

import divergence


def test_export() -> None:
    """The export computes what the model computes, by the tolerance of divergence.toml."""
    divergence.assert_close("pytorch", "onnx")
