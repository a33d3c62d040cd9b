"""Pairs on Ray: the same reports as one after another, whatever becomes of the workers."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import divergence
from divergence import Pairs, on_ray
from divergence.config import Config
from divergence.demo import inputs, write_bundled
from divergence.errors import ConfigurationError
from divergence.pairs import Work, compare_pairs
from divergence.probes import silent
from divergence.result import Comparison
from divergence.setting import Options

ray = pytest.importorskip("ray")

ROOT = Path(__file__).parents[1]

MODEL = """
import os, signal
from pathlib import Path
import torch
from divergence.demo import load

def scaled():
    model = load()
    with torch.no_grad():
        model.layers[1].self_attn.v_proj.weight.mul_(1.02)
    return model

def interrupted():
    "As scaled; kills its process where it is armed, once for each line of the file."
    armed = Path(__file__).with_name("armed")
    if armed.exists():
        left = armed.read_text().splitlines()[1:]
        armed.write_text("\\n".join(left)) if left else armed.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return scaled()

def deadly():
    os.kill(os.getpid(), signal.SIGKILL)
"""
REFERENCE = "pytorch:model.py:load"
CANDIDATES = ["clean.onnx", "rotary-bf16.onnx", "pytorch:model.py:interrupted", "absent.onnx"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "model.py").write_text(MODEL)
    for name in ("clean", "rotary-bf16"):
        write_bundled(name, folder / f"{name}.onnx")
    for tokens in (8, 10):
        arrays: dict[str, Any] = {n: t.numpy() for n, t in inputs(tokens=tokens).items()}
        np.savez(folder / f"in{tokens}.npz", **arrays)
    return folder


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    (project / "armed").unlink(missing_ok=True)
    return project


def told(pairs: Pairs) -> list[dict[str, Any]]:
    """All reports without times."""
    found = []
    for pair in pairs.pairs:
        content = json.loads(pair.comparison.to_json())
        for name in ("date", "seconds"):
            content["environment"].pop(name, None)
        found.append({**content, "pair": pair.name, "folder": pair.folder})
    return found


def compared(cands: Sequence[object], samples: int, address: str | None) -> Pairs:
    given = [inputs(tokens=6 + 2 * i) for i in range(samples)]
    return compare_pairs(REFERENCE, cands, given, ray=address, config=Config())


@pytest.fixture(scope="module")
def workers() -> Iterator[None]:
    """A Ray of two workers, which all pairs of a test run on."""
    with on_ray._cluster("local:2", silent):
        yield
    assert not ray.is_initialized()


@pytest.mark.slow
def test_24_pairs_on_two_workers_are_those_of_one_after_another(here: Path, workers: None) -> None:
    """Also when a worker is killed in the middle, and when two are."""
    serial = compared(CANDIDATES, 6, None)
    assert len(serial.pairs) == 24
    assert serial.reason == "6 of 24 pairs could not be answered, 12 fail"
    found = compared(CANDIDATES, 6, "local:2")
    assert told(found) == told(serial)
    assert found.environment["ray"] == {"workers": 2, "tasks": 6, "lost": 0}
    for kills in (1, 2):
        (here / "armed").write_text("\n".join(["once"] * kills))
        killed = compared(CANDIDATES, 6, "local:2")
        assert killed.environment["ray"]["lost"] == kills
        assert told(killed) == told(serial)
    assert (serial.verdict, serial.reason) == (killed.verdict, killed.reason)


@pytest.mark.slow
def test_a_pair_that_kills_every_worker_is_an_error_and_takes_no_other_with_it(
    here: Path, workers: None
) -> None:
    found = compared(["pytorch:model.py:deadly", "pytorch:model.py:load", "clean.onnx"], 1, "local:2")
    assert [pair.comparison.verdict for pair in found.pairs] == ["error", "pass", "pass"]
    assert "its worker was lost 3 times" in found.pairs[0].comparison.reason
    assert "\n" not in found.pairs[0].comparison.reason
    assert found.environment["ray"]["lost"] == 3


@pytest.mark.slow
def test_models_and_tensors_are_sent_and_what_cannot_be_is_refused(here: Path, workers: None) -> None:
    from divergence.demo import load

    given = [inputs(tokens=8)]
    found = compare_pairs(load(), [load()], given, ray="local:2", config=Config())
    assert found.verdict == "pass" and found.pairs[0].comparison.reference == "pytorch"
    model: Any = load()
    model.lock = threading.Lock()
    with pytest.raises(ConfigurationError, match=r"cannot be sent to workers .*pytorch:FILE.py:FUNC"):
        compare_pairs(model, [load()], given, ray="local:2", config=Config())


@pytest.mark.slow
def test_captures_need_no_inputs_there_either(here: Path, workers: None) -> None:
    for name in ("clean", "rotary-bf16"):
        divergence.capture(f"{name}.onnx", "in8.npz", f"{name}.capture", config=Config())
    cands = ["clean.capture", "rotary-bf16.capture"]
    limits = "rel_l2=1e-5"
    found = compare_pairs("clean.capture", cands, ray="local:2", config=Config(), tolerance=limits)
    assert [pair.comparison.verdict for pair in found.pairs] == ["pass", "fail"]


@pytest.mark.slow
def test_more_gpus_than_there_are_is_refused(here: Path, workers: None) -> None:
    with pytest.raises(ConfigurationError, match="--ray-gpus 1: the cluster has 0"):
        compare_pairs(REFERENCE, ["clean.onnx"], [inputs()], ray="local:2", gpus=1, config=Config())


def command(project: Path, *args: str) -> subprocess.Popen[str]:
    code = "from divergence.cli import main; main()"
    given = ["compare", "--ref", REFERENCE, "--inputs", "in8.npz", "--inputs", "in10.npz", *args]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *given],
        cwd=project,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What commands take for the folder of temporary files: other tests start Rays at the same time."""
    # A short path: see `_LONGEST_FOLDER`.
    with tempfile.TemporaryDirectory(prefix="d-", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def sessions(temporary: Path) -> set[str]:
    """Folders of the Rays that divergence has started."""
    return {path.name for path in temporary.glob("ray-*")}


def running(names: set[str]) -> list[str]:
    """Processes that name one of the folders `names`."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if any(name in line for name in names)]


@pytest.mark.slow
def test_the_command_starts_a_ray_ends_it_and_is_quiet(here: Path, temporary: Path) -> None:
    (here / "armed").write_text("once")
    process = command(
        here, "--cand", "clean.onnx", "--cand", "pytorch:model.py:interrupted", "--ray", "local:2"
    )
    started: set[str] = set()
    while process.poll() is None:
        started |= sessions(temporary)
        time.sleep(0.05)
    out, err = process.communicate()
    assert process.returncode == 1, err
    assert "2 of 4 pairs fail" in out and "2 workers, 4 tasks, 1 lost" in out and "raylet" not in out
    stages = ("starting Ray: ", "comparing pairs: ")
    assert all(line.startswith(stages) for line in err.splitlines()), err
    assert started and not sessions(temporary) and not running(started)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 2), (signal.SIGTERM, 143)])
def test_an_interrupted_command_leaves_no_ray_behind(
    number: signal.Signals, status: int, here: Path, temporary: Path
) -> None:
    out = f"stopped-{number}"
    process = command(here, *["--cand", "pytorch:model.py:load"] * 40, "--ray", "local:2", "--out", out)
    started: set[str] = set()
    while len(list((here / out).glob("*/report.json"))) < 2:  # so that the first is done with
        assert process.poll() is None, process.communicate()
        started |= sessions(temporary)
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=180)  # beside other tests
    assert process.returncode == status, err
    assert err.splitlines()[-1].endswith(f" are in {out}, without an index")
    assert started and not sessions(temporary) and not running(started)


@pytest.mark.slow
def test_a_machine_that_is_lost_costs_no_pair(here: Path) -> None:
    """Of a cluster of two, while both are at work."""
    from ray.cluster_utils import Cluster

    machine: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster: Any = Cluster(initialize_head=True, head_node_args=machine)
    try:
        other = cluster.add_node(**machine)
        wanted = ["--cand", "clean.onnx", "--cand", "rotary-bf16.onnx"] * 3
        process = command(here, *wanted, "--ray", cluster.address, "--out", "lost")
        while len(list((here / "lost").glob("*/report.json"))) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        cluster.remove_node(other, allow_graceful=False)
        out, err = process.communicate(timeout=300)
    finally:
        cluster.shutdown()
    assert process.returncode == 1, err
    assert "6 of 12 pairs fail" in out
    verdicts = [json.loads(p.read_text())["verdict"] for p in (here / "lost").glob("*/report.json")]
    assert sorted(verdicts) == ["fail"] * 6 + ["pass"] * 6


@pytest.mark.slow
def test_another_cluster_than_the_connected_one_is_refused(here: Path, workers: None) -> None:
    with pytest.raises(ConfigurationError, match=r"Ray is connected to .* here; call ray.shutdown"):
        compared(["clean.onnx"], 1, "10.0.0.1:6379")


# --- what becomes of tasks, without a Ray ---------------------------------------------------------------


class FakeRay:
    """Runs a task when it is asked for; `fates` says which are lost, and which raise."""

    exceptions = ray.exceptions

    def __init__(self, fates: Sequence[str], cpus: float = 2, gpus: float = 0) -> None:
        self.fates = list(fates)
        self.resources = {"CPU": cpus, "GPU": gpus}
        self.asked: list[dict[str, Any]] = []

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def put(self, value: object) -> object:
        return value

    def remote(self, _: object) -> Any:
        """A task whose pairs are answered by their names alone."""
        return self

    def options(self, **options: Any) -> Any:
        self.asked.append(options)
        return type("Task", (), {"remote": staticmethod(lambda *args: functools.partial(named, *args))})

    def wait(self, refs: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return refs[-1:], refs[:-1]

    def get(self, ref: Any) -> Any:
        fate = self.fates.pop(0) if self.fates else "done"
        if fate == "lost":
            raise ray.exceptions.WorkerCrashedError
        if fate == "raises":
            raise ray.exceptions.RayTaskError("f", "traceback", ImportError("no module named x"))
        return ref()


def named(work: Work, sample: Any, numbers: Sequence[int], *_: object) -> list[tuple[int, Comparison]]:
    return [(n, work.unanswered(n, f"answered {n} on {int(sample['x'])}")) for n in numbers]


def of(*names: str, ref: str = "ref") -> Work:
    config = Config()
    return Work(ref, names, names, config, Options(), config.tolerance, ())


def answered_by(fake: FakeRay, cands: int, samples: int) -> list[tuple[int, int, Comparison]]:
    given = [{"x": torch.tensor(i)} for i in range(samples)]
    work = of(*(f"c{i}.onnx" for i in range(cands)))
    return list(on_ray._Run(fake, work, given, None, {}, silent).answers())


@given(
    st.integers(1, 7),
    st.integers(1, 5),
    st.integers(1, 9),
    st.lists(st.sampled_from(["done", "lost", "lost", "raises"]), max_size=40),
)
def test_every_pair_has_one_answer_whatever_becomes_of_the_tasks(
    cands: int, samples: int, cpus: int, fates: list[str]
) -> None:
    fake = FakeRay(fates, cpus)
    found = answered_by(fake, cands, samples)
    assert sorted((s, c) for s, c, _ in found) == [(s, c) for s in range(samples) for c in range(cands)]
    for sample, cand, comparison in found:
        assert comparison.candidate == f"c{cand}.onnx" and comparison.verdict == "error"
        known = (f"answered {cand} on {sample}", "its worker was lost 3 times", "no module named x")
        assert any(words in comparison.reason for words in known)
    assert all(options["max_retries"] == 0 for options in fake.asked)
    assert len(fake.asked) <= on_ray.ATTEMPTS * cands * samples


def test_a_lost_task_is_tried_again_pair_by_pair() -> None:
    fake = FakeRay(["lost"], cpus=1)
    assert all("answered" in c.reason for _, _, c in answered_by(fake, 4, 1))
    assert len(fake.asked) == 2 + 2  # two tasks of two; one of them again as two


def test_a_pair_whose_worker_is_always_lost_is_given_up() -> None:
    fake = FakeRay(["lost"] * 100, cpus=1)
    found = answered_by(fake, 2, 3)
    assert len(found) == 6 and all("its worker was lost 3 times" in c.reason for _, _, c in found)
    assert len(fake.asked) == 3 + 6 + 6  # a task for each sample, then twice each pair alone


def test_what_a_task_raises_is_not_tried_again() -> None:
    fake = FakeRay(["raises"], cpus=1)
    reasons = [c.reason for _, _, c in answered_by(fake, 4, 1)]
    assert sum("no module named x" in reason for reason in reasons) == 2
    assert len(fake.asked) == 2


@pytest.mark.parametrize(
    ("cands", "samples", "cpus", "tasks"),
    [(4, 6, 2, 6), (4, 1, 2, 4), (24, 1, 2, 4), (1, 1, 64, 1), (3, 2, 2, 4)],
)
def test_the_reference_runs_no_oftener_than_keeps_all_busy(
    cands: int, samples: int, cpus: int, tasks: int
) -> None:
    fake = FakeRay([], cpus)
    answered_by(fake, cands, samples)
    assert len(fake.asked) == tasks


def test_a_gpu_is_asked_for_by_what_needs_one_if_there_is_one() -> None:
    work = of("a.plan", "b.onnx")
    for held, asked in ((1.0, [1.0, 0.0]), (0.0, [0.0, 0.0])):
        run = on_ray._Run(FakeRay([], gpus=held), work, [{}], None, {}, silent)
        assert run._gpus == asked


def test_another_version_on_a_worker_is_refused() -> None:
    work = of("a.onnx")
    with pytest.raises(ConfigurationError, match="has divergence .* and the command 0.0.1; install the same"):
        on_ray._answered(work, {}, [0], ".", "0.0.1")


def test_a_folder_that_a_worker_does_not_have_is_named() -> None:
    from divergence import __version__

    work = of("a.onnx", ref="pytorch:gone.py:load")
    ((_, answer),) = on_ray._answered(work, {}, [0], "/no/such/folder", __version__)
    assert "gone.py: no such file" in answer.reason
    assert "the command's folder /no/such/folder does not exist" in answer.reason


def test_without_ray_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ConfigurationError, match=r"--ray needs Ray .*pip install 'divergence-debugger\[ray\]'"
    ):
        compare_pairs("a", ["b"], [{}], ray="local", config=Config())
