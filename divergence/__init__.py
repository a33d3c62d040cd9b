"""Layer-wise numerical divergence debugger for transformers in PyTorch, ONNX and TensorRT.

Importing this loads no framework; names are resolved when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from divergence.assertions import assert_close
    from divergence.captures import Capture, open_capture
    from divergence.chain import compare_chain
    from divergence.chain_result import Chain, Step
    from divergence.comparison import compare_tensors
    from divergence.comparison.metrics import Metrics
    from divergence.config import Config, Tolerance, load_config
    from divergence.errors import (
        AlignmentError,
        CaptureError,
        ConfigurationError,
        DivergenceError,
        InputError,
        SourceError,
        StorageError,
    )
    from divergence.pairs import compare_pairs
    from divergence.pairs_result import PairResult, Pairs
    from divergence.pipeline import capture, compare
    from divergence.result import Comparison, SiteResult
    from divergence.sites import Site

__version__ = "0.1.0"

_HOME = {
    "assert_close": "assertions",
    "capture": "pipeline",
    "compare": "pipeline",
    "compare_chain": "chain",
    "compare_pairs": "pairs",
    "compare_tensors": "comparison",
    "load_config": "config",
    "open_capture": "captures",
    "Capture": "captures",
    "Chain": "chain_result",
    "Comparison": "result",
    "Config": "config",
    "Metrics": "comparison.metrics",
    "PairResult": "pairs_result",
    "Pairs": "pairs_result",
    "Site": "sites",
    "SiteResult": "result",
    "Step": "chain_result",
    "Tolerance": "config",
    "AlignmentError": "errors",
    "CaptureError": "errors",
    "ConfigurationError": "errors",
    "DivergenceError": "errors",
    "InputError": "errors",
    "SourceError": "errors",
    "StorageError": "errors",
}

__all__ = [
    "AlignmentError",
    "Capture",
    "CaptureError",
    "Chain",
    "Comparison",
    "Config",
    "ConfigurationError",
    "DivergenceError",
    "InputError",
    "Metrics",
    "PairResult",
    "Pairs",
    "Site",
    "SiteResult",
    "SourceError",
    "Step",
    "StorageError",
    "Tolerance",
    "assert_close",
    "capture",
    "compare",
    "compare_chain",
    "compare_pairs",
    "compare_tensors",
    "load_config",
    "open_capture",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'divergence' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"divergence.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
