from __future__ import annotations

import threading

import pytest
import torch

from divergence import comparison
from divergence.setting import comparison_loading


@pytest.mark.parametrize("gpu", [False, True])
def test_the_comparison_loads_on_a_thread_on_machines_with_a_gpu(
    monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(
        comparison, "compare_tensors", lambda *_: seen.append(threading.current_thread().name)
    )
    with comparison_loading():
        pass
    assert seen == (["load-comparison"] if gpu else [])


def test_what_loading_raises_is_left_to_whoever_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(comparison, "compare_tensors", broken)
    with comparison_loading():
        pass
