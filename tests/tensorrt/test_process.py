from __future__ import annotations

from collections.abc import Iterator

import pytest

from divergence.errors import InputError, SourceError
from divergence.probes.tensorrt.process import Worker


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(preload=()) as made:
        yield made


def test_a_job_gets_its_request_and_reports_progress(worker: Worker) -> None:
    seen = []
    request = {"a": [1, 2.5, "ü"], "b": None}
    result = worker.call(
        "tests.tensorrt.jobs:echo", request, about="x", needs_device=False, progress=lambda *p: seen.append(p)
    )
    assert result == request
    assert seen == [("echoing", 1, 2)]
    assert "a library prints this" in worker.log()


def test_our_errors_come_back_as_themselves(worker: Worker) -> None:
    with pytest.raises(InputError, match="^input 'x' is missing$"):
        worker.call(
            "tests.tensorrt.jobs:refuse", {"message": "input 'x' is missing"}, about="x", needs_device=False
        )


def test_unforeseen_errors_name_the_job_and_leave_the_worker_alive(worker: Worker) -> None:
    with pytest.raises(SourceError, match="stumble failed: KeyError: 'absent'"):
        worker.call("tests.tensorrt.jobs:stumble", {}, about="x", needs_device=False)
    assert worker.call("tests.tensorrt.jobs:echo", {"still": "here"}, about="x", needs_device=False) == {
        "still": "here"
    }


def test_an_abort_becomes_an_error_with_the_last_words() -> None:
    with Worker(preload=()) as dying:
        with pytest.raises(SourceError) as caught:
            dying.call("tests.tensorrt.jobs:abort", {}, about="engine.plan", needs_device=False)
        message = str(caught.value)
        assert message.startswith("engine.plan: the TensorRT process was killed by SIGABRT")
        assert "terminate called without an active exception" in message
        assert "\n" not in message
        with pytest.raises(SourceError, match="SIGABRT"):
            dying.call("tests.tensorrt.jobs:echo", {}, about="engine.plan", needs_device=False)


def test_without_a_device_jobs_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with Worker(preload=()) as blind, pytest.raises(SourceError, match="needs a CUDA device"):
        blind.call("divergence.probes.tensorrt.engine:run", {}, about="engine.plan")


def test_what_was_posted_is_fetched_in_order(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    job = "tests.tensorrt.jobs:echo"
    send = worker._send
    monkeypatch.setattr(worker, "_send", lambda *args, **_: send(*args, needs_device=False))
    worker.post(job, {"number": 1}, about="x")
    worker.post(job, {"number": 2}, about="x")
    assert worker.fetch(about="x") == {"number": 2}
    worker.post("tests.tensorrt.jobs:stumble", {}, about="x")
    worker.post(job, {"number": 3}, about="x")
    with pytest.raises(SourceError, match="stumble failed"):
        worker.fetch(about="x")
    assert worker.fetch(about="x") == {"number": 3}
