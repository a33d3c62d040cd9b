"""Pairs as tasks on a Ray cluster.

A task answers some candidates on one sample, with a run of the reference of its own, and leaves nothing
behind in its worker. There are at least two tasks for a worker where there are pairs enough, so that the
reference of a sample runs no more often than keeping all workers busy takes.

Ray itself retries nothing: what a task raises would be raised again, and a task whose worker was lost is
split into its pairs first, so that one that kills its worker takes no other with it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from divergence import __version__
from divergence.errors import ConfigurationError, one_line
from divergence.inputs import Given
from divergence.interrupts import kept
from divergence.pairs import STAGE, Answer, Work, reason_of
from divergence.probes import Progress
from divergence.result import Comparison
from divergence.setting import Inputs, read_inputs
from divergence.sources import is_engine, settings_of
from divergence.working import cores

ATTEMPTS = 3
"""How often a pair is tried whose worker is lost."""

TASKS_PER_WORKER = 2
ANSWER_SECONDS = 40.0
"""How long a cluster may take to answer."""

STORE_BYTES = 256 << 20
"""Object store of a Ray that is started here: samples and results are small; more goes to the disk."""

_TICK = 1.0
_TOLD = "worker died or was killed|due to memory pressure|node .* has been marked dead"
_LONGEST_FOLDER = 24
"""Ray's sockets lie in its folder, and the path of a socket has about 100 characters at most."""


@dataclass(frozen=True)
class _Task:
    """Candidates to be answered on a sample, and how often their worker was lost."""

    sample: int
    numbers: tuple[int, ...]
    lost: int = 0


def answers_of(
    address: str,
    work: Work,
    given: Sequence[Given | None],
    gpus: float | None,
    environment: dict[str, object],
    progress: Progress,
) -> Generator[Answer, None, None]:
    """The answer of every pair, in the order in which they are known.

    Args:
        address: as of `divergence.compare_pairs`.
        given: the samples.
        gpus: that a task asks for.
        environment: is told of the cluster and how many tasks were lost.
        progress: told how many pairs are done.

    Raises:
        ConfigurationError: there is no Ray, or what the tasks work on cannot be sent to it.
    """
    with _cluster(address, progress) as ray:
        yield from _Run(ray, work, given, gpus, environment, progress).answers()


class _Run:
    """The tasks of a command."""

    def __init__(
        self,
        ray: Any,
        work: Work,
        given: Sequence[Given | None],
        gpus: float | None,
        environment: dict[str, object],
        progress: Progress,
    ) -> None:
        self._ray = ray
        self._work = work
        self._given = given
        self._progress = progress
        there = ray.cluster_resources()
        self._workers = max(1, int(there.get("CPU", 1)))
        held = there.get("GPU", 0.0)
        if gpus is not None and gpus > held:
            raise ConfigurationError(f"--ray-gpus {gpus:g}: the cluster has {held:g}; ask for fewer")
        self._gpus = [
            gpus if gpus is not None else float(held > 0 and _needs_gpu(cand, work)) for cand in work.cands
        ]
        self._queue = deque(self._planned())
        self._facts = {"workers": self._workers, "tasks": len(self._queue), "lost": 0}
        environment["ray"] = self._facts
        self._remote = ray.remote(_answered)
        self._shared = self._sent(work, "the sources")

    def _planned(self) -> Iterator[_Task]:
        count = len(self._work.cands)
        wanted = -(-TASKS_PER_WORKER * self._workers // len(self._given))
        parts = min(count, wanted)
        for sample in range(len(self._given)):
            bounds = [count * i // parts for i in range(parts + 1)]
            for low, high in itertools.pairwise(bounds):
                yield _Task(sample, tuple(range(low, high)))

    def answers(self) -> Iterator[Answer]:
        """The answers as they come."""
        running: dict[Any, _Task] = {}
        done, total = 0, len(self._work.cands) * len(self._given)
        self._progress(STAGE, done, total)
        while self._queue or running:
            # Few at a time: samples are loaded when they are needed, and let go.
            while self._queue and len(running) < TASKS_PER_WORKER * self._workers:
                task = self._queue.popleft()
                try:
                    running[self._submitted(task)] = task
                except Exception as error:
                    for answer in self._failed(task, reason_of(error)):
                        done += 1
                        yield answer
            ready, _ = self._ray.wait(list(running), timeout=_TICK) if running else ((), ())
            for ref in ready:
                for answer in self._collected(ref, running.pop(ref)):
                    done += 1
                    yield answer
            self._progress(STAGE, done, total)

    def _submitted(self, task: _Task) -> Any:
        work = self._work
        read = read_inputs(self._given[task.sample], work.config, [work.ref, *work.cands])
        inputs = self._sent(read or None, "the inputs")
        gpus = max(self._gpus[number] for number in task.numbers)
        options = {"num_cpus": 1, "num_gpus": gpus, "max_retries": 0}
        remote = self._remote.options(**options)
        return remote.remote(self._shared, inputs, task.numbers, str(Path.cwd()), __version__)

    def _sent(self, what: object, name: str) -> Any:
        try:
            return self._ray.put(what)
        except Exception as error:
            raise ConfigurationError(
                f"--ray: {name} cannot be sent to workers ({one_line(error)}); name models as "
                "pytorch:FILE.py:FUNC or by files"
            ) from error

    def _collected(self, ref: Any, task: _Task) -> Iterator[Answer]:
        """What came of a task; one whose worker was lost is put at the end of the queue."""
        errors = self._ray.exceptions
        try:
            for number, comparison in self._ray.get(ref):
                yield task.sample, number, comparison
        except errors.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            yield from self._failed(task, reason_of(cause))
        except errors.RayError as error:
            self._facts["lost"] += 1
            if task.lost + 1 < ATTEMPTS:
                self._queue += [_Task(task.sample, (n,), task.lost + 1) for n in task.numbers]
                return
            why = f"its worker was lost {ATTEMPTS} times ({one_line(error)})"
            yield from self._failed(task, f"{why}; run this pair alone, without --ray")
        except Exception as error:
            yield from self._failed(task, f"its result could not be read ({one_line(error)})")

    def _failed(self, task: _Task, reason: str) -> Iterator[Answer]:
        for number in task.numbers:
            yield task.sample, number, self._work.unanswered(number, reason)


def _answered(
    work: Work, inputs: Inputs | None, numbers: Sequence[int], folder: str, version: str
) -> list[tuple[int, Comparison]]:
    """The task, in a worker.

    Args:
        work: what to compare.
        inputs: of the sample; None where all are captures.
        numbers: of the candidates.
        folder: where the command was given, which its names are relative to.
        version: of divergence there.
    """
    if version != __version__:
        raise ConfigurationError(
            f"worker on {socket.gethostname()} has divergence {__version__}, and the command {version}; "
            "install the same"
        )
    if Path(folder).is_dir():
        with contextlib.chdir(folder):
            return list(work.answers(inputs, numbers))
    answers = list(work.answers(inputs, numbers))
    hint = f"; on {socket.gethostname()}, where the command's folder {folder} does not exist"
    return [
        (n, work.unanswered(n, c.reason + hint) if c.verdict == "error" and not c.sites else c)
        for n, c in answers
    ]


def _needs_gpu(cand: object, work: Work) -> bool:
    """Whether a candidate is known to run on a GPU; of a function that loads a model nobody knows."""
    settings = settings_of(cand, work.config)
    if settings is not None:
        return is_engine(settings) or (settings.provider or "").startswith(("CUDA", "Tensorrt"))
    parameters = getattr(cand, "parameters", lambda: ())
    return any(parameter.is_cuda for parameter in parameters())


@contextlib.contextmanager
def _cluster(address: str, progress: Progress) -> Iterator[Any]:
    """Ray, connected: what was connected before stays so, and what is started here is ended here."""
    try:
        # What is lost is told in the result; Ray would print it to standard output, among the reports.
        with kept(), _environment(RAY_USAGE_STATS_ENABLED="0", RAY_DEDUP_LOGS_SKIP_REGEX=_TOLD):
            import ray
            import ray.exceptions
    except ImportError as error:
        raise ConfigurationError(
            f"--ray needs Ray ({one_line(error)}): pip install 'divergence-debugger[ray]'"
        ) from error
    if ray.is_initialized():
        connected = ray.get_runtime_context().gcs_address
        if not (address == "auto" or address.startswith(("local", "ray://")) or address == connected):
            raise ConfigurationError(
                f"--ray {address}: Ray is connected to {connected} here; call ray.shutdown() first"
            )
        yield ray
        return
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment(RAY_USAGE_STATS_ENABLED="0"))
        if address.partition(":")[0] == "local":
            quiet |= {"num_cpus": _workers(address), "object_store_memory": STORE_BYTES}
            quiet["_temp_dir"] = stack.enter_context(_short_folder())
            progress("starting Ray", 0, 0)
        else:
            progress("asking for Ray", 0, 0)
            _ask(address)
            quiet = {"log_to_driver": False, "logging_level": "ERROR", "address": address}
        stack.callback(ray.shutdown)
        try:
            with kept():
                ray.init(**quiet)
        except Exception as error:
            raise ConfigurationError(f"--ray {address}: {one_line(error)}; check the address") from error
        yield ray


def _workers(address: str) -> int:
    """The workers that `local` or `local:N` asks for."""
    _, colon, number = address.partition(":")
    if not colon:
        return cores()
    if not number.isdecimal() or not int(number):
        raise ConfigurationError(f"--ray {address}: write it as local or local:2")
    return int(number)


def _ask(address: str) -> None:
    """Connects in a process of its own first: a connection that is not answered cannot be given up within
    two minutes, and then ends the process.

    Raises:
        ConfigurationError: there is no answer in `ANSWER_SECONDS`.
    """
    code = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')"
    try:
        tried = subprocess.run(
            [sys.executable, "-c", code, address],
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigurationError(
            f"--ray {address}: no Ray answers there within {ANSWER_SECONDS:g} s; check the address, or give "
            "--ray local"
        ) from error
    if "AuthenticationError" in tried.stderr:
        raise ConfigurationError(
            f"--ray {address}: the cluster asks for a token and got none, or another; set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to its file"
        )
    if tried.returncode:
        said = [line.strip() for line in tried.stderr.splitlines() if line.strip()] or ["no reason given"]
        mend = "check the address, or give --ray local"
        if address.startswith("ray://"):  # which does not answer a client without its token
            mend += ", or set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH if the cluster asks for a token"
        raise ConfigurationError(f"--ray {address}: {said[-1][:300]}; {mend}")


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Sets variables that the user has not set, for as long as the context lasts."""
    added = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _short_folder() -> Iterator[str]:
    """A folder for what Ray writes, deleted afterwards: sockets, logs and what its store spills."""
    usual = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="ray-", dir=usual if len(usual) <= _LONGEST_FOLDER else "/tmp")  # noqa: S108 (mkdtemp is safe there)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
