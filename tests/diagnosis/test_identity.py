"""Every emulation does nothing when its fault is absent: with the parameter that means no fault, the
layer gives what it gives without."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from divergence.diagnosis import masks, parts, products, rotary, weights
from divergence.diagnosis.case import Case
from divergence.diagnosis.causes import (
    activation,
    attention_scale,
    kv_swapped,
    layer_order,
    norm_eps,
    overflow_norm,
    overflow_residual,
    quant_int8,
    rope_precision,
)
from divergence.diagnosis.emulate import Fault, LayerUnit
from tests.diagnosis.faults import case_of, layer, planted
from tests.models import MODELS, inputs_for

NAMES = ("llama", "llama-eager", "gemma2", "qwen3", "gpt2")


def _rotary(case: Case, make: Callable[[rotary.Rotary], Fault]) -> list[Fault]:
    found = rotary.find(case)
    return [] if found is None else [make(found)]


def _layout(found: rotary.Rotary) -> Fault:
    return found.with_layout("halves")


def _attention(case: Case, make: Callable[[parts.Attention], Fault]) -> list[Fault]:
    return [make(attention) for attention in parts.attentions(case.trace)]


def _eps(case: Case) -> list[Fault]:
    return [Fault(operators=partial(norm_eps.with_epsilon, [n], n.epsilon)) for n in parts.norms(case.trace)]


def _activation(case: Case) -> list[Fault]:
    same = {"silu": "silu", "gelu": "gelu (tanh)", "gelu (tanh)": "gelu (tanh)"}
    return [
        Fault(operators=activation._handlers(place, activation.FUNCTIONS[same[place.name]]))
        for place in parts.activated(case)
    ]


def _residual(case: Case) -> list[Fault]:
    return [
        Fault(
            operators=partial(
                overflow_residual._handlers, overflow_residual.residual_sums(case), overflow_residual.to_half
            )
        )
    ]


def _permuted(case: Case) -> list[Fault]:
    def in_order(weight: torch.Tensor) -> torch.Tensor:
        return weight.index_select(0, torch.arange(weight.shape[0]))

    return [weights.fault([part], in_order) for part in weights.matrices(case)]


def _own_layer(case: Case) -> list[Fault]:
    assert isinstance(case.unit, LayerUnit)
    again = planted(case.unit.module, lambda _: None)
    changes = layer_order.taken_from(case.unit.module, again)
    assert changes is not None
    return [Fault(parameters=changes)]


FAULTS: dict[str, Callable[[Case], list[Fault]]] = {
    "gain": lambda case: [weights.fault([part], lambda w: w * 1.0) for part in weights.matrices(case)],
    "norm_eps": _eps,
    "attention_scale": lambda case: _attention(case, lambda a: attention_scale._fault(a)(1.0)),
    "mask": lambda case: _attention(case, lambda a: masks.with_mask(a, masks.same)),
    "softmax": lambda case: _attention(case, lambda a: masks.with_softmax(a, lambda s: s.softmax(-1))),
    "rope angles": lambda case: _rotary(case, lambda r: rope_precision.rounded_angles(r, torch.float32, ())),
    "rope layout": lambda case: _rotary(case, _layout),
    "activation": _activation,
    "products": lambda case: [
        products.computed(products.projections(case), products.rounded_operands(lambda t: t))
    ],
    "sums": lambda case: [
        products.computed(products.projections(case), products.accumulated(torch.float32, 8))
    ],
    "residual in range": _residual,
    "norm in range": lambda case: [
        Fault(operators=partial(overflow_norm.handlers, case, parts.norms(case.trace)))
    ],
    "order": _permuted,
    "layer": _own_layer,
    "exchanged twice": lambda _: [Fault(outputs=lambda t: kv_swapped.exchanged(kv_swapped.exchanged(t)))],
}


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    reference = MODELS[request.param]()

    def fault(model: object) -> None:
        mlp = layer(model, 1).mlp
        (mlp.down_proj if hasattr(mlp, "down_proj") else mlp.c_proj).weight.mul_(1.1)

    return case_of(reference, planted(reference, fault), inputs_for(request.param))


@pytest.mark.parametrize("name", FAULTS)
def test_an_emulation_without_its_fault_changes_nothing(case: Case, name: str) -> None:
    faults = FAULTS[name](case)
    size = float(case.valid_clean(case.tensor).norm())
    for fault in faults:
        assert float(case.emulated(fault).norm()) < 2e-6 * size


def test_the_parts_of_a_layer_are_recognised(case: Case) -> None:
    assert len(parts.attentions(case.trace)) == 1
    assert len(parts.activated(case)) == 1
    assert len(parts.norms(case.trace)) >= 2
    assert all(1e-7 < n.epsilon < 1e-4 for n in parts.norms(case.trace))


def test_the_rotary_embedding_is_read_back() -> None:
    reference = MODELS["llama"]()
    candidate = planted(reference, lambda m: layer(m, 1).mlp.down_proj.weight.mul_(1.1))
    inputs = inputs_for("llama", 2, 33)
    inputs["attention_mask"][0, :5] = 0
    inputs["position_ids"] = torch.arange(33).expand(2, -1) + torch.tensor([[0], [700]])
    found = rotary.find(case_of(reference, candidate, inputs))
    assert found is not None
    assert torch.equal(found.positions, inputs["position_ids"].double())
    assert torch.equal(found.unique, reference.model.rotary_emb.inv_freq)
    assert len(found.turns) == 2


def test_without_a_rotary_embedding_none_is_found() -> None:
    reference = MODELS["gpt2"]()
    candidate = planted(reference, lambda m: layer(m, 1).mlp.c_proj.weight.mul_(1.1))
    assert rotary.find(case_of(reference, candidate, inputs_for("gpt2"))) is None


def test_int8_leaves_what_it_can_hold() -> None:
    weight = torch.arange(-127, 128).float().reshape(5, 51)
    assert torch.equal(quant_int8.rounded(None, 127.0)(weight), weight)
