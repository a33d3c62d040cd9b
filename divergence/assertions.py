"""Assertions for test suites."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from divergence import session
from divergence.config import Config, Tolerance, load_config
from divergence.errors import DivergenceError
from divergence.pipeline import compare
from divergence.result import Comparison, Policy
from divergence.thresholds import Thresholds, with_thresholds

if TYPE_CHECKING:
    from divergence.inputs import Given


def assert_close(
    ref: object,
    cand: object,
    inputs: Given | None = None,
    *,
    tolerance: Thresholds | None = None,
    config: Config | None = None,
    **options: Any,
) -> Comparison:
    """Asserts that a candidate passes against a reference.

    In a pytest session with the plugin, the markers of the running test count too, a reference that
    has run before is not run again, and the comparison is among those of `--divergence-report`.

    Args:
        ref, cand, inputs, **options: as for `divergence.compare`.
        tolerance: what to judge by, on top of the test's markers, which are on top of the
            configuration; see `divergence.thresholds.with_thresholds`.
        config: the configuration; by default that of the current folder, else of pytest's root.

    Returns:
        The comparison, for further assertions.

    Raises:
        AssertionError: the verdict is fail; the first three lines give layer and tensor, figure
            against limit, and cause, the rest is the terminal report.
        DivergenceError: the question could not be answered.
    """
    __tracebackhide__ = True
    from divergence.reports.assertion import render_assertion

    try:
        result, page = _compared(ref, cand, inputs, tolerance, config, options)
    except DivergenceError as error:
        # Its message says all; what the model itself raised stays its cause.
        raise error.with_traceback(None)  # noqa: B904 (the same error)
    if result.verdict == "pass":
        return result
    if result.verdict == "error":
        raise DivergenceError(result.reason)
    raise AssertionError(render_assertion(result, page))


def _compared(
    ref: object,
    cand: object,
    inputs: Given | None,
    tolerance: Thresholds | None,
    config: Config | None,
    options: dict[str, Any],
) -> tuple[Comparison, Path | None]:
    """The comparison with what the session says, and its page where there is one."""
    running = session.current()
    if running is None:
        config = config or load_config()
        judged = config.tolerance if tolerance is None else _with(config.tolerance, tolerance)
        return compare(ref, cand, inputs, tolerance=judged, config=config, **options), None
    config = config or running.config()
    judged = config.tolerance
    command = str(options.get("command", running.command()))
    try:
        tolerances, marked = running.marked()
        for given in tolerances:
            judged = with_thresholds(judged, given, session.MARKER)
        if tolerance is not None:
            judged = _with(judged, tolerance)
        options = {"command": command, **marked, **options}
        set_by_marker = options.pop("inputs", None)
        inputs = set_by_marker if inputs is None else inputs
        # Captures that the user wants to keep have to be made.
        if options.get("keep") is None:
            options.setdefault("references", running.references)
        result = compare(ref, cand, inputs, tolerance=judged, config=config, **options)
    except DivergenceError as error:
        running.record(_unanswered(ref, cand, str(error), judged, command))
        raise
    return result, running.record(result)


def _with(base: Tolerance, tolerance: Thresholds) -> Tolerance:
    return with_thresholds(base, tolerance, "tolerance")


def _unanswered(ref: object, cand: object, reason: str, tolerance: Tolerance, command: str) -> Comparison:
    """The comparison that could not be made, for the report."""
    return Comparison(
        verdict="error",
        reason=reason,
        first_divergence=None,
        reference=_name(ref),
        candidate=_name(cand),
        policy=Policy(tolerance.policy, tolerance.ratio, sites=tolerance.sites),
        sites=(),
        command=command,
    )


def _name(source: object) -> str:
    return str(source) if isinstance(source, str | Path) else type(source).__name__
