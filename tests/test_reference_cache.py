"""Runs of references that stand for later ones: when they may, and that nothing but time tells."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import divergence
from divergence import demo, reference_cache
from divergence.config import Config
from divergence.demo.export import LowPrecisionRotary
from divergence.errors import SourceError
from divergence.identity import identity
from divergence.reference_cache import KEPT, ReferenceCache
from divergence.result import Comparison
from divergence.setting import Setting

INPUTS = demo.inputs(tokens=12)


def faulty() -> Any:
    model = demo.load()
    with torch.no_grad():
        model.get_submodule("layers.3.self_attn.v_proj").get_parameter("weight").mul_(1.02)
    return model


def figures(result: Comparison) -> Comparison:
    """The result without when it was made and how long it took."""
    kept = {k: v for k, v in result.environment.items() if k not in ("date", "seconds")}
    return replace(result, environment=kept)


def _swap_rows(model: Any) -> None:
    weight = model.get_submodule("layers.1.mlp.up_proj").get_parameter("weight")
    weight[[5, 6]] = weight[[6, 5]]


def _patched(model: Any) -> None:
    model.layers[1].forward = lambda *args, **kwargs: args[0]


CHANGES: dict[str, Callable[[Any], object]] = {
    "a weight": lambda m: m.get_submodule("layers.1.mlp.up_proj").get_parameter("weight").mul_(1.001),
    "the order of weights": _swap_rows,
    "a buffer": lambda m: m.rotary.inv_freq.mul_(1.001),
    "an attribute": lambda m: setattr(m.layers[0].get_submodule("input_layernorm"), "epsilon", 1e-3),
    "a module": lambda m: setattr(m, "rotary", LowPrecisionRotary(m.rotary, torch.bfloat16)),
    "a dtype": lambda m: m.half(),
    "a hook": lambda m: m.layers[0].register_forward_hook(lambda module, args, output: output),
    "a forward": _patched,
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_whatever_changes_the_result_changes_the_identity(change: str) -> None:
    model = demo.load()
    before = identity(model)
    assert before is not None and before == identity(demo.load())
    CHANGES[change](model)
    assert identity(model) != before


def test_code_that_is_replaced_changes_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity(demo.load())
    with monkeypatch.context() as patch:
        patch.setattr("divergence.demo.model.rotate", lambda x, cos, sin: x)
        assert identity(demo.load()) != before
    with monkeypatch.context() as patch:
        patch.setattr("divergence.demo.model.RMSNorm.forward", lambda self, x: x)
        assert identity(demo.load()) != before
    assert identity(demo.load()) == before


def test_what_cannot_be_looked_into_has_no_identity() -> None:
    model: Any = demo.load()
    model.lock = threading.Lock()
    assert identity(model) is None
    assert identity(demo.load().to("meta")) is None


def test_a_reference_without_identity_is_compared_all_the_same() -> None:
    model: Any = demo.load()
    model.lock = threading.Lock()
    cache = ReferenceCache()
    result = divergence.compare(model, demo.load(), INPUTS, config=Config(), references=cache)
    assert result.verdict == "pass"


def test_a_run_that_is_used_again_changes_no_figure() -> None:
    cache = ReferenceCache()
    fresh = divergence.compare(demo.load(), faulty(), INPUTS, config=Config())
    for _ in range(2):
        again = divergence.compare(demo.load(), faulty(), INPUTS, config=Config(), references=cache)
        assert figures(again) == figures(fresh)
    assert fresh.verdict == "fail" and fresh.causes
    cache.close()


def test_a_fault_put_into_the_reference_later_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The very module that ran before, changed in place."""
    cache = ReferenceCache()
    model = demo.load()

    def verdict() -> str:
        return divergence.compare(model, demo.load(), INPUTS, config=Config(), references=cache).verdict

    assert verdict() == "pass"
    with demo.planted(model, rotary_dtype=torch.bfloat16):
        assert verdict() == "fail"
    assert verdict() == "pass"
    cache.close()


def test_few_runs_are_kept_and_deleted_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    made = reference_cache._run

    def noted(probe: Any, setting: Setting) -> Any:
        kept = made(probe, setting)
        folders.append(kept.capture.path)
        return kept

    monkeypatch.setattr("divergence.reference_cache._run", noted)
    cache = ReferenceCache()
    for tokens in range(2, KEPT + 4):
        divergence.compare(
            demo.load(), demo.load(), demo.inputs(tokens=tokens), config=Config(), references=cache
        )
    assert [folder.exists() for folder in folders] == [False] * 2 + [True] * KEPT
    cache.close()
    assert not any(folder.exists() for folder in folders)


def test_a_reference_that_cannot_run_is_not_kept() -> None:
    cache = ReferenceCache()
    bad = {"input_ids": torch.full((1, 4), 5000), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    for _ in range(2):
        with pytest.raises(SourceError, match="IndexError"):
            divergence.compare(demo.load(), demo.load(), bad, config=Config(), references=cache)
