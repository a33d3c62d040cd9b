"""What stands in another order is named, and which order it is: heads, parts of a projection, layers."""

from __future__ import annotations

from typing import Any

import pytest

from divergence.result import Cause
from tests.diagnosis.faults import Plant, diagnosed, planted
from tests.models import MODELS, inputs_for


def named(reference: Any, fault: Plant, kind: str) -> Cause:
    """The only cause that is found."""
    (found,) = diagnosed(reference, planted(reference, fault), inputs_for(kind)).causes
    assert found.explained is not None and found.explained > 0.999
    return found


def cross(model: Any) -> Any:
    """Cross-attention of the second layer of T5's decoder."""
    return model.decoder.block[1].layer[1].EncDecAttention


def exchange(model: Any) -> None:
    attention = cross(model)
    attention.k, attention.v = attention.v, attention.k


def test_keys_and_values_of_cross_attention_that_are_exchanged_are_named() -> None:
    found = named(MODELS["t5"](), exchange, "t5")
    assert (found.id, found.site) == ("kv_swapped", "decoder.layers.1.cross_key")
    path = "layer.1.EncDecAttention"
    assert found.parameters["exchanged"] == [f"{path}.k.weight", f"{path}.v.weight"]


@pytest.mark.parametrize(("name", "tensor"), [("k", "cross_key"), ("v", "cross_value")])
@pytest.mark.parametrize("order", [[1, 0, 3, 2], [1, 2, 3, 0], [2, 0, 3, 1]])
def test_the_order_of_heads_of_cross_attention_is_found(name: str, tensor: str, order: list[int]) -> None:
    def fault(model: Any) -> None:
        weight = getattr(cross(model), name).weight
        weight.copy_(weight.unflatten(0, (4, -1))[order].flatten(0, 1))

    found = named(MODELS["t5"](), fault, "t5")
    assert (found.id, found.site) == ("weight_permuted", f"decoder.layers.1.{tensor}")
    assert (found.parameters["unit"], found.parameters["order"]) == ("heads", order)
