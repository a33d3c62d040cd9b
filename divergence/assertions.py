"""Assertions for test suites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from divergence.errors import DivergenceError
from divergence.pipeline import compare
from divergence.result import Comparison

if TYPE_CHECKING:
    import torch


def assert_close(
    ref: object, cand: object, inputs: Mapping[str, torch.Tensor] | str | None = None, **options: Any
) -> Comparison:
    """Asserts that a candidate passes against a reference.

    Args:
        ref, cand, inputs, **options: as for `divergence.compare`.

    Returns:
        The comparison, for further assertions.

    Raises:
        AssertionError: the verdict is fail; the first lines give layer, tensor and figure against
            limit, the rest is the terminal report.
        DivergenceError: the question could not be answered.
    """
    from divergence.reports.terminal import render

    result = compare(ref, cand, inputs, **options)
    if result.verdict == "pass":
        return result
    if result.verdict == "error":
        raise DivergenceError(result.reason)
    raise AssertionError(f"{result.reason}\n{render(result)}")
