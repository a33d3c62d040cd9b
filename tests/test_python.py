"""What Python may hand over: arrays, tolerances in any form, paths as texts, one pattern."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import divergence
from divergence import demo
from divergence.config import Config
from divergence.errors import ConfigurationError, InputError

ARRAYS = {name: tensor.numpy() for name, tensor in demo.inputs().items()}


def faulty() -> Any:
    model: Any = demo.load()
    with torch.no_grad():
        model.layers[1].self_attn.v_proj.weight.mul_(1.02)
    return model


def test_arrays_are_inputs(tmp_path: Path) -> None:
    config = Config()
    assert divergence.compare(demo.load(), demo.load(), ARRAYS, config=config).verdict == "pass"
    assert divergence.assert_close(demo.load(), demo.load(), ARRAYS, config=config).verdict == "pass"
    arrays = divergence.capture(demo.load(), ARRAYS, tmp_path / "a.capture", config=config)
    tensors = divergence.capture(demo.load(), demo.inputs(), tmp_path / "t.capture", config=config)
    assert arrays.inputs_digest == tensors.inputs_digest
    chain = divergence.compare_chain(demo.load(), [demo.load()], ARRAYS, config=config)
    assert chain.verdict == "pass"
    assert divergence.compare_pairs(demo.load(), [demo.load()], [ARRAYS], config=config).verdict == "pass"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(1, 4), "inputs is a Tensor; give a mapping by input name"),
        (np.zeros((1, 4)), "inputs is a ndarray; give a mapping by input name"),
        ([torch.zeros(1, 4)], "inputs is a list; give a mapping by input name"),
        (
            {"input_ids": [1, 2]},
            "input 'input_ids' of the mapping is list; give a torch tensor or a numpy array",
        ),
        ({0: torch.zeros(1)}, "names of inputs are texts"),
        ({}, "the model needs input 'input_ids'"),
    ],
)
def test_other_inputs_are_refused(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        divergence.compare(demo.load(), demo.load(), given, config=Config())
    with pytest.raises(InputError, match=message):
        divergence.capture(demo.load(), given, tmp_path / "a.capture", config=Config())


@pytest.mark.parametrize("tolerance", ["*:rel_l2=0.5", {"ratio": 1e6}, ["ratio=1e6"]])
def test_tolerances_have_any_form_that_assertions_take(tolerance: Any) -> None:
    found = divergence.compare(demo.load(), faulty(), ARRAYS, config=Config(), tolerance=tolerance)
    assert found.verdict == "pass"
    strict = divergence.compare(demo.load(), faulty(), ARRAYS, config=Config(), diagnose=False)
    assert strict.verdict == "fail"


@pytest.mark.parametrize("compare", [divergence.compare, divergence.compare_chain, divergence.compare_pairs])
@pytest.mark.parametrize("tolerance", [4, "", "cosin=1"])
def test_other_tolerances_are_refused(compare: Any, tolerance: Any) -> None:
    cand = demo.load() if compare is divergence.compare else [demo.load()]
    inputs = [ARRAYS] if compare is divergence.compare_pairs else ARRAYS
    with pytest.raises(ConfigurationError, match="^tolerance: "):
        compare(demo.load(), cand, inputs, config=Config(), tolerance=tolerance)


def test_one_pattern_excludes() -> None:
    found = divergence.compare(demo.load(), demo.load(), ARRAYS, config=Config(), exclude="layers.1.*")
    assert found.verdict == "pass"
    assert {u.site for u in found.unmatched if u.state == "excluded"} == {
        f"layers.1.{tensor}" for tensor in ("key", "value", "hidden")
    }
    with pytest.raises(ConfigurationError, match="no pattern"):
        divergence.compare(demo.load(), demo.load(), ARRAYS, config=Config(), exclude="")


def test_a_path_may_be_a_text(tmp_path: Path) -> None:
    (tmp_path / "divergence.toml").write_text('exclude = ["output.*"]\n')
    assert divergence.load_config(str(tmp_path / "divergence.toml")).exclude == ("output.*",)
    assert divergence.load_config(start=str(tmp_path)).exclude == ("output.*",)
    np.savez(tmp_path / "inputs.npz", allow_pickle=False, **ARRAYS)
    found = divergence.compare(demo.load(), demo.load(), tmp_path / "inputs.npz", config=Config())
    assert found.verdict == "pass"
