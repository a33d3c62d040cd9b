"""Pairs: every candidate on every sample of inputs, one after another here or as tasks on Ray.

A pair is answered by the code that compares one candidate with one reference. The reference runs once for
a sample and its candidates, or for the part of them that is a task on Ray; noise floors are each pair's
own, so that what its report says depends neither on the order of the pairs nor on who ran them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from divergence.chain import labels_of, short, unanswered
from divergence.config import Config, Tolerance, load_config
from divergence.errors import ConfigurationError, DivergenceError, one_line
from divergence.inputs import Given
from divergence.interrupts import remembered
from divergence.job import Job
from divergence.pairs_result import PairResult, Pairs
from divergence.pipeline import timed
from divergence.prepared import prepared
from divergence.probes import Progress, silent
from divergence.result import Comparison
from divergence.setting import Options
from divergence.sites import patterns_of
from divergence.sources import open_source
from divergence.thresholds import Thresholds, with_thresholds
from divergence.working import file_name

if TYPE_CHECKING:
    from divergence.probes.tensorrt.options import EngineOptions

STAGE = "comparing pairs"

Answer = tuple[int, int, Comparison]
"""Number of the sample, number of the candidate, and what came of the two."""


def unseen(pair: PairResult) -> None:
    """Does nothing with a pair that is done."""


def compare_pairs(
    ref: object,
    cands: Sequence[object],
    inputs: Sequence[Given] = (),
    *,
    ray: str | None = None,
    gpus: float | None = None,
    names: Sequence[str] = (),
    samples: Sequence[str] = (),
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
    done: Callable[[PairResult], None] = unseen,
    progress: Progress = silent,
) -> Pairs:
    """Compares every candidate with the reference on every sample of inputs.

    A pair that cannot be answered loses none of the others: its comparison has the verdict `error`.

    Args:
        ref: the reference: a source (see `divergence.sources.open_source`).
        cands: the candidates: sources.
        inputs: the samples: tensors by input name, or where to load them from; by default the one of the
            configuration.
        ray: where pairs run: here by default; `local` or `local:2` for a Ray that is started here, with as
            many workers as cores or as given, and ended afterwards; else the address of a Ray cluster
            (`HOST:PORT`, `ray://HOST:PORT`, `auto`). Files are looked for under the same path there.
        gpus: GPUs that a task on Ray asks for; by default 1 for candidates that need one, if there is any.
        names, samples: short labels for candidates and samples; by default from their sources.
        keep: folder to keep all captures in, a folder for each sample; not on Ray.
        done: told of every pair as soon as it is answered.
        precision, tolerance, exclude, detail, replay, floor, memory, engine, diagnose, config, command,
            progress: as for `divergence.compare`.

    Raises:
        ConfigurationError: there is no candidate, labels do not fit, or Ray cannot be had.
    """
    started = time.monotonic()
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
    labels = labels_of(cands, names, "compare_pairs", label=_label)
    given: Sequence[Given | None] = [None] if inputs == () else inputs
    asked = [config.inputs or "inputs"] if inputs == () else inputs
    sample_labels = labels_of(asked, samples, "compare_pairs", "sample", _label)
    work = Work(
        ref,
        tuple(cands),
        labels,
        config,
        options,
        config.tolerance if tolerance is None else with_thresholds(config.tolerance, tolerance, "tolerance"),
        patterns_of(exclude),
    )
    total = len(cands) * len(given)
    environment: dict[str, object] = {"pairs": total}
    if ray is None:
        answers = _here(work, given, keep, progress)
    else:
        if keep is not None:
            raise ConfigurationError("captures are not kept on Ray; record them with `divergence capture`")
        from divergence.on_ray import answers_of

        answers = answers_of(ray, work, given, gpus, environment, progress)
    found: dict[tuple[int, int], PairResult] = {}
    with contextlib.closing(answers), remembered() as raise_if_interrupted:
        for sample, cand, comparison in answers:
            number = f"{sample * len(cands) + cand + 1:0{len(str(total))}}"
            folder = f"{number}-{file_name(f'{labels[cand]}-{sample_labels[sample]}')}"
            pair = PairResult(labels[cand], sample_labels[sample], comparison, folder)
            found[sample, cand] = pair
            done(pair)
            raise_if_interrupted()
            progress(STAGE, len(found), total)
    environment["seconds"] = round(time.monotonic() - started, 3)
    ordered = [found[s, c] for s in range(len(given)) for c in range(len(cands))]
    return Pairs.of(ordered, work.reference, environment, command)


@dataclass(frozen=True)
class Work:
    """What all pairs share; it is sent to Ray's workers whole.

    Attributes:
        labels: of the candidates.
    """

    ref: object
    cands: tuple[object, ...]
    labels: tuple[str, ...]
    config: Config
    options: Options
    tolerance: Tolerance
    exclude: tuple[str, ...]

    @property
    def reference(self) -> str:
        """The reference's name where it did not run."""
        return str(self.ref) if isinstance(self.ref, str | Path) else short(self.ref)

    def answers(
        self,
        inputs: Given | None,
        numbers: Sequence[int],
        keep: Path | None = None,
        progress: Progress = silent,
    ) -> Iterator[tuple[int, Comparison]]:
        """Compares the candidates called by `numbers` with one run of the reference on `inputs`.

        Whatever goes wrong is the answer to the pairs that it concerns.
        """
        left = list(numbers)
        try:
            with prepared(
                self.ref,
                [self.cands[number] for number in numbers],
                inputs,
                config=self.config,
                options=self.options,
                tolerance=self.tolerance,
                exclude=self.exclude,
                keep=keep,
                progress=progress,
            ) as (setting, reference):
                for number in numbers:
                    # Floors that another candidate had measured would make this one's judged by them too.
                    own = replace(reference, floors={})
                    answer = self._answer(number, Job(setting, own, f"candidate-{number + 1}"))
                    left.remove(number)
                    yield number, answer
        except Exception as error:
            for number in left:
                yield number, self.unanswered(number, reason_of(error))

    def _answer(self, number: int, job: Job) -> Comparison:
        started = time.monotonic()
        try:
            return timed(job.run(self.cands[number]), started)
        except Exception as error:
            return self.unanswered(number, reason_of(error), job.reference.facts.source)

    def unanswered(self, number: int, reason: str, reference: str = "") -> Comparison:
        """The answer to a question that has none."""
        return unanswered(
            reason,
            self.cands[number],
            self.labels[number],
            reference or self.reference,
            self.tolerance,
            self.options.command,
        )


def reason_of(error: Exception) -> str:
    """What went wrong, in one line."""
    return str(error) if isinstance(error, DivergenceError) else f"unexpected {one_line(error)}"


def _here(
    work: Work, given: Sequence[Given | None], keep: Path | None, progress: Progress
) -> Generator[Answer, None, None]:
    """The pairs one after another, by sample."""
    numbers = range(len(work.cands))
    try:
        # Loaded once; it runs once for each sample.
        opened = replace(work, ref=open_source(work.ref, work.config))
    except Exception as error:
        for sample in range(len(given)):
            for number in numbers:
                yield sample, number, work.unanswered(number, reason_of(error))
        return
    for sample, inputs in enumerate(given):
        folder = keep / f"sample-{sample + 1}" if keep is not None else None
        for number, comparison in opened.answers(inputs, numbers, folder, progress):
            yield sample, number, comparison


def _label(thing: object) -> str:
    """A short label for a source or a sample; tensors have no name of their own."""
    if isinstance(thing, Mapping):
        return "inputs"
    return thing.rpartition(":")[2] if isinstance(thing, str) and ".py:" in thing else short(thing)
