from __future__ import annotations

import pytest

from divergence.probes.tensorrt.outputs import sites_of
from divergence.probes.tensorrt.sidecar import Output, Sidecar


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("layers.3.key", "layers.3.key"),
        ("key_3", "layers.3.key"),
        ("v_0", "layers.0.value"),
        ("layer_2_hidden", "layers.2.hidden"),
        ("present.4.value", "layers.4.value"),
        ("past_key_values.4.key", "layers.4.key"),
        ("hidden_states_3", "output.hidden_states_3"),
        ("key_1_2", "output.key_1_2"),
        ("keys", "output.keys"),
        ("<img src=x>", "output.<img src=x>"),
    ],
)
def test_names_that_say_what_they_are(name: str, site: str) -> None:
    assert [str(f.site) for f in sites_of([name], None, {}, "engine.plan")] == [site]


def test_an_output_that_says_which_site_it_is_is_no_output_beside() -> None:
    sidecar = Sidecar(
        plan_digest="",
        model="",
        model_digest="",
        precision="fp32",
        options={},
        built={},
        outputs=(
            Output("last", "layers.1.hidden", (), ""),
            Output("layers.0.hidden", "layers.0.hidden", (), ""),
        ),
        own_outputs=("layers.0.hidden", "last"),
    )
    found = sites_of(["layers.0.hidden", "last"], sidecar, {}, "engine.plan")
    assert [str(f.site) for f in found] == ["layers.0.hidden", "layers.1.hidden", "output.last"]


def test_the_only_stack_of_the_reference_is_meant() -> None:
    assert str(sites_of(["key_3"], None, {}, "e", ["decoder"])[0].site) == "decoder.layers.3.key"


def test_sites_come_in_execution_order_and_outputs_last() -> None:
    names = ["logits", "hidden_1", "value_1", "key_1", "hidden_0", "key_0"]
    assert [str(f.site) for f in sites_of(names, None, {}, "e")] == [
        "layers.0.key",
        "layers.0.hidden",
        "layers.1.key",
        "layers.1.value",
        "layers.1.hidden",
        "output.logits",
    ]
