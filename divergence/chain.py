"""The chain: several candidates, each made from the one before it, against one run of the reference.

Original module, export wrapper, ONNX, engine: every source runs once and is captured once. Each
candidate is compared with the reference, and, capture against capture, with the one before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from divergence.blame import judge_step
from divergence.chain_result import Chain, Difference, Step
from divergence.config import Config, Tolerance, load_config
from divergence.errors import ConfigurationError, DivergenceError
from divergence.inputs import Given
from divergence.job import Job
from divergence.pipeline import timed
from divergence.prepared import Reference, prepared
from divergence.probes import Progress, silent
from divergence.result import Comparison, Policy, Verdict
from divergence.setting import Options

if TYPE_CHECKING:
    from divergence.probes.tensorrt.options import EngineOptions
    from divergence.thresholds import Thresholds


def compare_chain(
    ref: object,
    cands: Sequence[object],
    inputs: Given | None = None,
    *,
    names: Sequence[str] = (),
    precision: str | None = None,
    tolerance: Thresholds | None = None,
    exclude: str | Sequence[str] = (),
    detail: bool = False,
    replay: Literal["auto", "always", "never"] = "auto",
    floor: object = None,
    memory: int = 512 << 20,
    engine: EngineOptions | None = None,
    diagnose: bool = True,
    keep: Path | None = None,
    config: Config | None = None,
    command: str = "",
    progress: Progress = silent,
) -> Chain:
    """Compares candidates with a reference and each with the one before it.

    A candidate that cannot be run or compared loses none of the others: its comparison has the
    verdict `error`, and the next candidate is held against the last one that could be compared.

    Args:
        ref: the reference: a source (see `divergence.sources.open_source`).
        cands: the candidates: sources, in the order in which each was made from the one before.
        names: a short label for each; by default from its source.
        precision: what all candidates are meant to run in; by default what each shows itself.
        inputs, tolerance, exclude, detail, replay, floor, memory, engine, diagnose, keep, config, command,
            progress: as for `divergence.compare`.

    Raises:
        DivergenceError: there is no candidate, or the reference cannot be run.
    """
    started = time.monotonic()
    labels = labels_of(cands, names, "compare_chain")
    config = load_config() if config is None else config
    options = Options(
        precision,
        detail,
        replay,
        floor,
        memory,
        command,
        engine,
        diagnose,
    )
    with prepared(
        ref,
        cands,
        inputs,
        config=config,
        options=options,
        tolerance=tolerance,
        exclude=exclude,
        keep=keep,
        progress=progress,
    ) as (setting, reference):
        links = [
            _compared(cand, label, Job(setting, reference, f"candidate-{i}"))
            for i, (cand, label) in enumerate(zip(cands, labels, strict=True), 1)
        ]
        steps = _steps(reference, links, setting.tolerance)
    verdict, reason = overall(links, steps)
    return Chain(
        verdict,
        reason,
        reference.capture.facts.source,
        labels,
        steps,
        tuple(link.comparison for link in links),
        {"seconds": round(time.monotonic() - started, 3)},
        command,
    )


@dataclass(frozen=True)
class Link:
    """A candidate of a chain: `job` is None where it could not be compared."""

    name: str
    comparison: Comparison
    job: Job | None


def _compared(cand: object, label: str, job: Job) -> Link:
    started = time.monotonic()
    try:
        return Link(label, timed(job.run(cand), started), job)
    except DivergenceError as error:
        failed = unanswered(
            str(error), cand, label, job.reference.facts.source, job.tolerance, job.options.command
        )
        return Link(label, failed, None)


def unanswered(
    reason: str, cand: object, label: str, reference: str, tolerance: Tolerance, command: str
) -> Comparison:
    """The comparison of a candidate, called `label`, that could not be made."""
    return Comparison.unanswered(
        reason,
        reference=reference,
        candidate=str(cand) if isinstance(cand, str | Path) else label,
        policy=Policy(tolerance.policy, tolerance.ratio, sites=tolerance.sites),
        command=command,
    )


def _steps(reference: Reference, links: Sequence[Link], tolerance: Tolerance) -> tuple[Step, ...]:
    steps = []
    before: Link | None = None
    skipped: list[str] = []
    for link in links:
        from_ = before.name if before is not None else reference.capture.facts.source
        if link.job is None:
            sentence = f"could not be compared: {link.comparison.reason}"
            steps.append(Step(from_, link.name, "error", sentence))
            skipped.append(link.name)
            continue
        step = judge_step(
            from_,
            link.name,
            before.comparison if before is not None else None,
            link.comparison,
            _differences(before.job if before is not None else None, link.job),
            tolerance,
        )
        steps.append(_spanning(step, skipped))
        before, skipped = link, []
    return tuple(steps)


def _differences(before: Job | None, after: Job) -> list[Difference]:
    """The candidate against the one before it, at every site that both have."""
    found = []
    for site in after.pairs:
        if before is not None and site not in before.pairs:
            continue
        metrics = after.difference(before, site)
        floor = after.floors.get(site)
        found.append(
            Difference(
                site=str(site),
                rel_l2=metrics.rel_l2,
                row_rel_l2=metrics.row_rel_l2,
                max_abs=metrics.max_abs,
                ratio=floor.ratio(metrics) if floor is not None else None,
                bit_equal=metrics.bit_equal,
            )
        )
    return found


def _spanning(step: Step, skipped: Sequence[str]) -> Step:
    """`step`, saying so where candidates between its ends could not be compared."""
    if not skipped:
        return step
    names = ", ".join(skipped)
    return replace(step, sentence=f"{step.sentence}; between the two, {names} could not be compared")


def overall(links: Sequence[Link], steps: Sequence[Step]) -> tuple[Verdict, str]:
    """Verdict and reason of the whole chain."""
    summary = "; ".join(f"{step.to}: {_in_a_word(step)}" for step in steps)
    verdicts = {link.comparison.verdict for link in links}
    if "error" in verdicts:
        name, comparison = next((k.name, k.comparison) for k in links if k.comparison.verdict == "error")
        others = f" ({summary})" if len(links) > 1 else ""
        return "error", f"{name} could not be compared: {comparison.reason}{others}"
    if "fail" in verdicts:
        failing = [link.name for link in links if link.comparison.verdict == "fail"]
        return "fail", f"{', '.join(failing)} {'fails' if len(failing) == 1 else 'fail'}, by step: {summary}"
    all_are = "the only candidate is" if len(links) == 1 else f"all {len(links)} candidates are"
    if all(step.bit_equal for step in steps):
        return "pass", f"{all_are} equal to the reference to the bit"
    return "pass", f"{all_are} within {'its' if len(links) == 1 else 'their'} limits"


def _in_a_word(step: Step) -> str:
    if step.verdict == "error":
        return "not known"
    return step.site or "none"


def labels_of(
    things: Sequence[object],
    names: Sequence[str],
    function: str,
    what: str = "candidate",
    label: Callable[[object], str] | None = None,
) -> tuple[str, ...]:
    """A label for each of several things, none of them twice.

    Args:
        things: sources or samples.
        names: the labels, if they are given.
        function: that was given them, for messages.
        what: what one of them is called.
        label: the label of one; by default `short`.

    Raises:
        ConfigurationError: there are none, or the labels do not fit.
    """
    if isinstance(things, str | Path) or not isinstance(things, Sequence):
        raise ConfigurationError(
            f"{function} takes a list of {what}s; give one with [...] or use divergence.compare"
        )
    if not things:
        raise ConfigurationError(f"{function} needs at least one {what}")
    if names and (len(names) != len(things) or len(set(names)) != len(names)):
        raise ConfigurationError(
            f"{len(names)} names for {len(things)} {what}s: give each a name, and none twice"
        )
    return tuple(names) or distinct([(label or short)(thing) for thing in things])


def distinct(labels: Sequence[str]) -> tuple[str, ...]:
    """`labels`, the second of the same name with `#2` behind it."""
    found: list[str] = []
    for name in labels:
        label, number = name, 2
        while label in found:
            label, number = f"{name}#{number}", number + 1
        found.append(label)
    return tuple(found)


def short(source: object) -> str:
    """A label for a source: its name in the configuration, its file's name, its function's, its class's."""
    if not isinstance(source, str | Path):
        return str(getattr(source, "source", "") or type(source).__name__)
    text = str(source)
    if text.startswith("pytorch:"):
        return text.rpartition(":")[2]
    return Path(text).name or text
