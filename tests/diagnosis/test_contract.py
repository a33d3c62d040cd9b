"""What an engine says of itself is evidence, whatever else its contract holds."""

from __future__ import annotations

from typing import Any

import pytest

from divergence.diagnosis.contract import accumulators, contract_of, ran_in
from divergence.probes import RunFacts
from divergence.probes.pytorch import PyTorchProbe
from tests.diagnosis.faults import diagnosed, planted
from tests.diagnosis.test_causes import KNOWN
from tests.models import MODELS, inputs_for

CONTRACT: dict[str, Any] = {
    "engine": "fp16",
    "rows": [
        {
            "module": "model.rotary_emb",
            "role": "rotary",
            "precision": "Half",
            "asked": "Float",
            "nodes": 5,
            "kernels": ["__myl_" + 20 * "CosSin"],
        },
        {"module": "model.layers.*.mlp", "role": "projection", "precision": "Half", "accumulator": "Half"},
        {"module": "model.layers.*.norm", "role": "norm", "precision": "Float", "accumulator": ""},
    ],
}

RAN = (
    "the engine ran its rotary in fp16 though the graph asks for Float: model.rotary_emb, "
    "inside __myl_CosSinCosSinCosSinCosSinCosSinCosSinCos..."
)


def _facts(contract: Any) -> RunFacts:
    return RunFacts("tensorrt", "engine.plan", "", details={"contract": contract})


def test_the_precision_of_a_role_is_told_with_its_module() -> None:
    assert list(ran_in(_facts(CONTRACT), "rotary")) == [RAN]
    assert not list(ran_in(_facts(CONTRACT), "norm"))


def test_half_precision_accumulators_are_told() -> None:
    assert list(accumulators(_facts(CONTRACT))) == [
        "the engine sums the products of model.layers.*.mlp in fp16"
    ]


@pytest.mark.parametrize("contract", [{}, None, "text", [1, 2], {"rows": "none"}, {"rows": [1]}])
def test_a_contract_of_another_form_says_nothing(contract: Any) -> None:
    facts = _facts(contract)
    assert not list(ran_in(facts, "rotary")) and not list(accumulators(facts))
    assert contract_of(RunFacts("onnx", "model.onnx", "")) == {}


def test_the_contract_supports_the_rounding_of_angles() -> None:
    class Engine(PyTorchProbe):
        def run(self, *args: Any, **kwargs: Any) -> RunFacts:
            facts = super().run(*args, **kwargs)
            return RunFacts(**{**vars(facts), "details": {**facts.details, "contract": CONTRACT}})

    reference = MODELS["llama"]()
    candidate = Engine(planted(reference, KNOWN["rope inv_freq"].fault))
    cause = diagnosed(reference, candidate, inputs_for("llama", 1, 40)).causes[0]
    assert cause.id == "rope_precision"
    assert RAN in cause.evidence
    assert any("grows with the position" in line for line in cause.evidence)
