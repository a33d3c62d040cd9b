"""References and candidates whose weights do not fit into memory together."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from divergence import room
from divergence.chain import compare_chain
from divergence.config import Config, SourceConfig
from divergence.errors import SourceError
from divergence.pipeline import compare
from divergence.result import Comparison
from tests.models import inputs_for, llama

MODEL = """
import copy
import weakref
import torch
from tests.models import llama

alive = weakref.WeakSet()
seen = []

def load():
    seen.append(("ref", len(alive)))
    model = llama()
    alive.add(model)
    return model

def faulty():
    seen.append(("cand", len(alive)))
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(1.02)
    alive.add(model)
    return model

def another():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.add_(torch.rand(()) * len(seen) + 1)
    seen.append(("another", len(alive)))
    alive.add(model)
    return model
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Any]:
    name = f"made_{uuid.uuid4().hex}"
    (tmp_path / f"{name}.py").write_text(MODEL, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import importlib

    return name, importlib.import_module(name)


def judged(ref: str, cand: str, **options: Any) -> Comparison:
    result = compare(f"pytorch:{ref}", f"pytorch:{cand}", inputs_for("llama"), config=Config(), **options)
    return replace(result, environment={})


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less memory than any model takes."""
    monkeypatch.setattr(room, "host_memory", lambda: 1000)


def test_a_reference_that_does_not_fit_beside_the_candidate_is_loaded_again_for_replay(
    module: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, made = module
    plain = judged(f"{name}:load", f"{name}:faulty", replay="always")
    assert made.seen == [("ref", 0), ("cand", 1)]
    made.seen.clear()
    monkeypatch.setattr(room, "host_memory", lambda: 1000)
    result = judged(f"{name}:load", f"{name}:faulty", replay="always")
    assert made.seen == [("ref", 0), ("cand", 0), ("ref", 0)], "two models were in memory together"
    assert result.notes[-1].startswith("reference and candidate do not fit into memory together")
    assert replace(result, notes=()) == replace(plain, notes=())
    assert result.first_divergence is not None
    assert result.first_divergence.site == "layers.1.value"
    assert result.causes[0].id == "weight_scale"


@pytest.mark.usefixtures("little")
def test_a_reference_that_nothing_needs_any_more_is_not_loaded_again(module: tuple[str, Any]) -> None:
    name, made = module
    assert judged(f"{name}:load", f"{name}:load").verdict == "pass"
    assert [who for who, _ in made.seen] == ["ref", "ref"]


@pytest.mark.usefixtures("little")
def test_a_reference_that_comes_back_with_other_weights_is_refused(module: tuple[str, Any]) -> None:
    name, _ = module
    with pytest.raises(SourceError, match="gave other weights when it was loaded again"):
        judged(f"{name}:another", f"{name}:faulty", replay="always")


@pytest.mark.usefixtures("little")
def test_a_module_that_the_caller_holds_stays(module: tuple[str, Any]) -> None:
    name, _ = module
    model = llama()
    result = compare(model, f"pytorch:{name}:faulty", inputs_for("llama"), config=Config())
    assert result.verdict == "fail"
    assert not any("released" in note for note in result.notes)


@pytest.mark.usefixtures("little")
def test_every_candidate_of_a_chain_gets_the_room(module: tuple[str, Any]) -> None:
    name, made = module
    chain = compare_chain(
        f"pytorch:{name}:load",
        [f"pytorch:{name}:faulty", f"pytorch:{name}:faulty"],
        inputs_for("llama"),
        config=Config(),
        replay="always",
    )
    assert [c.verdict for c in chain.comparisons] == ["fail", "fail"]
    assert all(others == 0 for _, others in made.seen), made.seen


def test_what_a_file_will_load_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"x" * 100)
    (tmp_path / "model.onnx.data").write_bytes(b"x" * 1000)
    (tmp_path / "other.bin").write_bytes(b"x" * 10_000)
    assert room.weights_of(model, Config()) == 1100
    assert room.weights_of("mine", Config(sources={"mine": SourceConfig(path=str(model))})) == 1100
    for unknown in ("pytorch:x:load", "no such", torch.nn.Linear(1, 1), tmp_path / "run.capture"):
        assert room.weights_of(unknown, Config()) is None
    for free, fits in ((2750, True), (2749, False), (None, True)):
        monkeypatch.setattr(room, "host_memory", lambda free=free: free)
        assert room.fits_twice(model, Config()) is fits


@pytest.mark.parametrize(("device", "fits"), [(250, True), (249, False), (None, True)])
def test_an_engine_must_fit_on_its_device_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: int | None, fits: bool
) -> None:
    monkeypatch.setattr(room, "host_memory", lambda: 10_000)
    monkeypatch.setattr(room, "device_size", lambda: device)
    (tmp_path / "engine.plan").write_bytes(b"x" * 100)
    (tmp_path / "model.onnx").write_bytes(b"x" * 100)
    assert room.fits_twice(tmp_path / "engine.plan", Config()) is fits
    assert room.fits_twice(tmp_path / "model.onnx", Config()), "runs on the host"


def test_free_memory_is_that_of_the_machine() -> None:
    free = room.host_memory()
    if free is None:
        pytest.skip("this system does not tell")
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    assert 0 < free <= int(lines[0].split()[1]) << 10


def test_files_that_a_container_would_give_up_count_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(room, "_CGROUPS", ((str(limit), str(used)),))
    limit.write_text("max\n")
    used.write_text("900\n")
    without = room.host_memory()
    assert without is not None and without > 1000
    limit.write_text("1000\n")
    assert room.host_memory() == 100
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_file 650\nactive_file 50\n")
    assert room.host_memory() == 750
    used.write_text("2000\n")
    assert room.host_memory() == 0
