"""References whose layers lie on several devices, or are brought in for each call and taken away again."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from divergence.captures import fingerprint
from divergence.config import Config
from divergence.pipeline import compare
from divergence.probes.pytorch import PyTorchProbe
from divergence.probes.pytorch.placement import brought_in, device_of, devices_of, named_weights
from divergence.result import Comparison
from tests.models import inputs_for, llama

LAYERS = 3
Placing = Callable[[Any, Path], Any]


def on_cpu(model: Any, folder: Path) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk(model: Any, folder: Path) -> Any:
    from accelerate import disk_offload

    return disk_offload(model, folder, execution_device=torch.device("cpu"))


def dispatched(model: Any, folder: Path) -> Any:
    """Some layers on the disk, the others where they run."""
    from accelerate import dispatch_model

    places = {name: "cpu" for name, _ in model.named_modules() if name.count(".") <= 2}
    parts = {"model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"}
    device_map = {name: "cpu" for name in places if name in parts}
    device_map |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(LAYERS)}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)


PLACINGS: dict[str, Placing] = {"cpu": on_cpu, "disk": on_disk, "dispatched": dispatched}


@pytest.fixture(params=PLACINGS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Any], Any]:
    numbers = itertools.count()

    def placed(model: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PLACINGS[request.param](copy.deepcopy(model), tmp_path / f"offloaded-{next(numbers)}")

    return placed


def faulty(model: Any) -> Any:
    """A copy with a value projection 2 % too large."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(1.02)
    return model


def judged(ref: Any, cand: Any, **options: Any) -> Comparison:
    return compare(ref, cand, inputs_for("llama", tokens=17), config=Config(), **options)


def told(result: Comparison) -> Any:
    """All but what names devices, dates and so on."""
    return replace(result, environment={}, command="", notes=())


def test_the_weights_are_elsewhere_between_calls(place: Callable[[Any], Any]) -> None:
    model = llama(LAYERS)
    placed = place(model)
    assert any(p.device.type == "meta" for p in placed.parameters())
    assert "offloaded" in devices_of(placed)
    assert devices_of(model) == ["cpu"]
    assert device_of(placed) == torch.device("cpu")


def test_the_weights_are_found_where_they_are(place: Callable[[Any], Any]) -> None:
    model = llama(LAYERS)
    assert fingerprint(named_weights(place(model))) == fingerprint(model.named_parameters())
    assert fingerprint(named_weights(place(faulty(model)))) != fingerprint(model.named_parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-weights", "fp16", "int8"])
def test_the_verdict_and_every_figure_are_those_of_the_model_in_one_place(
    place: Callable[[Any], Any], precision: str
) -> None:
    model = llama(LAYERS)
    options: dict[str, Any] = {"precision": precision, "replay": "always"}
    plain = judged(model, faulty(model), **options)
    placed = place(model)
    assert told(judged(placed, faulty(model), **options)) == told(plain)
    assert any(p.device.type == "meta" for p in placed.parameters()), "brought in and never taken out again"
    assert told(judged(model, place(faulty(model)), **options)) == told(plain)


def test_the_cause_is_found_and_the_layer_written(place: Callable[[Any], Any], tmp_path: Path) -> None:
    model = llama(LAYERS)
    result = judged(place(model), faulty(model), repro=tmp_path / "repro")
    assert result.first_divergence is not None
    assert result.first_divergence.site == "layers.1.value"
    assert result.causes[0].id == "weight_scale"
    layer = torch.load(tmp_path / "repro" / "layer.pt", weights_only=False)
    assert torch.equal(layer.self_attn.v_proj.weight, model.model.layers[1].self_attn.v_proj.weight)


def test_a_swap_of_layers_is_found(place: Callable[[Any], Any]) -> None:
    model = llama(LAYERS)
    swapped = copy.deepcopy(model)
    swapped.model.layers[1].load_state_dict(model.model.layers[2].state_dict())
    result = judged(place(model), swapped)
    assert result.causes[0].id == "layer_order", result.causes


def test_weights_that_were_brought_in_are_taken_out_again_whatever_happens(
    place: Callable[[Any], Any],
) -> None:
    model, inputs = llama(LAYERS), inputs_for("llama")
    placed = place(model)
    with torch.inference_mode():
        before = placed(**inputs).logits.clone()
        with pytest.raises(RuntimeError), brought_in(placed.modules()):
            assert all(p.device.type == "cpu" for p in placed.parameters())
            raise RuntimeError
        assert any(p.device.type == "meta" for p in placed.parameters())
        after = placed(**inputs).logits
    assert torch.equal(after, before)


class Sharded(nn.Module):
    """Two layers on two devices, which the model itself moves its hidden states between."""

    def __init__(self, devices: tuple[str, str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).to(device) for device in devices
        )
        self.head = nn.Linear(8, 4).to(devices[1])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x.to(next(layer.parameters()).device))
        result: Tensor = self.head(x)
        return result


def two_devices() -> tuple[str, str]:
    return ("cuda:0", "cuda:1") if torch.cuda.device_count() > 1 else ("cpu", "cpu")


def test_each_layer_is_replayed_where_it_lies() -> None:
    """With one device it shows that the way is right, with two that the devices are."""
    model = Sharded(two_devices())
    cand = Sharded(("cpu", "cpu"))
    with torch.no_grad():
        list(cand.layers[1].parameters())[2].mul_(1.02)
    inputs = {"x": torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(2))}
    result = compare(model, cand, inputs, config=Config(), replay="always")
    assert result.first_divergence is not None
    assert result.first_divergence.site == "layers.1.hidden"
    assert result.site("layers.0.hidden").introduced is not None


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("offloaded", [False, True])
def test_a_model_on_two_devices_is_captured_as_it_stands(offloaded: bool) -> None:
    from accelerate import dispatch_model

    model = llama(LAYERS)
    placed = copy.deepcopy(model)
    places: list[str | int] = [0, "cpu" if offloaded else 1, 1]
    device_map: dict[str, Any] = dict.fromkeys(("model.embed_tokens", "model.rotary_emb"), 0)
    device_map |= dict.fromkeys(("model.norm", "lm_head"), 1)
    device_map |= {f"model.layers.{i}": where for i, where in enumerate(places)}
    placed = dispatch_model(placed, device_map)
    with torch.inference_mode():  # the first product of a process leaves a workspace
        placed(**{name: tensor.cuda() for name, tensor in inputs_for("llama").items()})
    before = [torch.cuda.memory_allocated(i) for i in range(2)]
    probe = PyTorchProbe(placed)
    facts = probe.run(inputs_for("llama"), lambda _: None)
    assert "cuda:0" in facts.details["device"]
    assert "cuda:1" in facts.details["device"]
    torch.cuda.synchronize()
    assert [torch.cuda.memory_allocated(i) for i in range(2)] == before
    result = judged(placed, faulty(model), replay="always")
    assert result.first_divergence is not None
    assert result.first_divergence.site == "layers.1.value"
    assert result.causes[0].id == "weight_scale"
