"""The reference and its inputs, as divergence.toml names them: here the bundled model."""

from __future__ import annotations

from divergence.demo import inputs, load

__all__ = ["inputs", "load"]
