from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from divergence.errors import ConfigurationError
from divergence.sites import (
    DEFAULT_TENSORS,
    DETAIL_TENSORS,
    HEAD_AXES,
    HIDDEN_AXES,
    LAYER_TENSORS,
    Site,
    in_execution_order,
    matches,
    name_stacks,
)

LAYER_SITES = st.builds(
    Site,
    layer=st.integers(0, 200),
    tensor=st.sampled_from(LAYER_TENSORS),
    stack=st.sampled_from(["", "encoder", "vision", "blocks_a", "model.vision"]),
    call=st.integers(1, 20),
)
OUTPUT_SITES = st.builds(
    Site.output, st.from_regex(r"[A-Za-z_][A-Za-z0-9_.]{0,20}", fullmatch=True), st.integers(1, 9)
)
SITES = st.one_of(LAYER_SITES, OUTPUT_SITES)


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("layers.3.key", Site(3, "key")),
        ("vision.layers.0.hidden", Site(0, "hidden", "vision")),
        ("layers.3.hidden@2", Site(3, "hidden", call=2)),
        ("output.logits", Site(None, "logits")),
        ("output.past.0.key@3", Site(None, "past.0.key", call=3)),
        ("a.layers.1.layers.2.value", Site(2, "value", "a.layers.1")),
    ],
)
def test_text_and_site_are_each_other(text: str, site: Site) -> None:
    assert Site.parse(text) == site
    assert str(site) == text


@given(SITES)
def test_every_site_is_read_back_from_its_text(site: Site) -> None:
    assert Site.parse(str(site)) == site


@pytest.mark.parametrize(
    "text", ["", "layers.3", "layers.x.key", "layers.3.keys", "layer.3.key", "output.", "3.key"]
)
def test_other_text_is_refused_with_the_form_in_one_line(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"is not a site; write it as layers\.N\.TENSOR") as raised:
        Site.parse(text)
    assert "\n" not in str(raised.value)


def test_axes_follow_the_tensor() -> None:
    assert Site(0, "key").axes == HEAD_AXES
    assert Site(0, "hidden").axes == HIDDEN_AXES
    assert Site.output("logits").axes == ()


def test_default_and_detail_tensors_are_all_tensors_once() -> None:
    assert sorted(DEFAULT_TENSORS + DETAIL_TENSORS) == sorted(LAYER_TENSORS)


def test_execution_order_within_a_layer_is_key_value_attention_hidden() -> None:
    shuffled = [Site(0, t) for t in ("hidden", "attention", "value", "mlp", "key", "query")]
    ordered = [site.tensor for site in in_execution_order(shuffled)]
    assert ordered == ["query", "key", "value", "attention", "mlp", "hidden"]


def test_execution_order_is_call_then_stack_then_layer_then_outputs() -> None:
    sites = [
        Site.output("logits"),
        Site(0, "hidden", "decoder"),
        Site(10, "hidden", "encoder"),
        Site(2, "hidden", "encoder"),
        Site(0, "hidden", "encoder", call=2),
    ]
    assert [str(site) for site in in_execution_order(sites, ("encoder", "decoder"))] == [
        "encoder.layers.2.hidden",
        "encoder.layers.10.hidden",
        "decoder.layers.0.hidden",
        "encoder.layers.0.hidden@2",
        "output.logits",
    ]


@given(st.lists(SITES, unique=True), st.randoms())
def test_execution_order_does_not_depend_on_the_order_given(sites: list[Site], random: object) -> None:
    shuffled = list(sites)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert in_execution_order(shuffled, ("encoder",)) == in_execution_order(sites, ("encoder",))


@pytest.mark.parametrize(
    ("site", "pattern", "expected"),
    [
        ("layers.1.key", "layers.*.key", True),
        ("layers.11.key", "layers.1.key", False),
        ("layers.1.key@2", "layers.1.key", True),
        ("layers.1.key@2", "layers.1.key@3", False),
        ("layers.1.key@2", "*@2", True),
        ("vision.layers.1.key", "layers.*.key", False),
        ("output.logits", "output.*", True),
        ("output.logits", "*", True),
    ],
)
def test_patterns_match_whole_sites_and_all_calls_unless_one_is_named(
    site: str,
    pattern: str,
    expected: bool,
) -> None:
    assert matches(Site.parse(site), pattern) is expected


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ([], {}),
        (["model.layers"], {"model.layers": ""}),
        (["encoder.layers", "decoder.layers"], {"encoder.layers": "encoder", "decoder.layers": "decoder"}),
        (
            ["m.encoder.layers", "m.decoder.layers"],
            {"m.encoder.layers": "encoder", "m.decoder.layers": "decoder"},
        ),
        (
            ["model.vision.blocks", "model.text.model.layers"],
            {"model.vision.blocks": "vision", "model.text.model.layers": "text"},
        ),
        (["a.b.x", "a.b.y"], {"a.b.x": "x", "a.b.y": "y"}),
        (["a.x.p", "a.x.q", "b.x"], {"a.x.p": "a_x_p", "a.x.q": "a_x_q", "b.x": "b_x"}),
    ],
)
def test_stacks_are_named_by_what_tells_them_apart(paths: list[str], names: dict[str, str]) -> None:
    assert name_stacks(paths) == names


@given(st.lists(st.from_regex(r"[a-c](\.[a-c]){0,3}", fullmatch=True), unique=True))
def test_names_of_stacks_are_distinct_and_survive_a_wrapper(paths: list[str]) -> None:
    named = name_stacks(paths)
    assert len(set(named.values())) == len(paths)
    assert list(name_stacks([f"wrapper.{path}" for path in paths]).values()) == list(named.values())
