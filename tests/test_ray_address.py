"""Addresses at which no Ray answers. In a file of its own: no test here may be connected to one."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

import pytest

from divergence import on_ray
from divergence.config import Config
from divergence.errors import ConfigurationError
from divergence.pairs import compare_pairs

ray = pytest.importorskip("ray")


def any_ray_runs() -> bool:
    """Whether this machine has a Ray, such as that of a test in another process (Linux)."""
    return any(b"gcs_server" in _command_line(process) for process in Path("/proc").glob("[0-9]*"))


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:  # it has ended
        return b""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["closed", "silent", "nonsense", "auto", "client"])
def test_an_address_that_does_not_answer_is_one_line_in_bounded_time(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "ANSWER_SECONDS", 8.0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with contextlib.closing(socket.socket()) as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        if kind == "silent":
            listening.listen()
        address = {"nonsense": "nonsense", "auto": "auto", "client": f"ray://127.0.0.1:{port}"}
        if kind == "auto" and any_ray_runs():
            pytest.skip("auto finds the Ray of another test")
        started = time.monotonic()
        with pytest.raises(ConfigurationError, match="--ray .*; check the address") as raised:
            compare_pairs("a", ["b.onnx"], [{}], ray=address.get(kind, f"127.0.0.1:{port}"), config=Config())
    assert time.monotonic() - started < 60
    assert "\n" not in str(raised.value)
    assert not ray.is_initialized()
