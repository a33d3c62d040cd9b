"""Which tensor answers which: every state, every layout, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from divergence.alignment import Alignment, align
from divergence.errors import AlignmentError, ConfigurationError
from divergence.sites import HEAD_AXES, HIDDEN_AXES, Site
from tests.strategies import SETTINGS, distinct_sizes

B, H, T, D, C, L = 1, 2, 7, 5, 12, 3


@dataclass(frozen=True)
class Entry:
    """What alignment needs to know of a tensor."""

    shape: tuple[int, ...]
    axes: tuple[str, ...] = ()


Run = dict[Site, Entry]


def model(layers: int = L, channels: int = C, stack: str = "", sizes: tuple[int, ...] = (B, H, T, D)) -> Run:
    """Key, value and hidden of every layer, axes named."""
    run: Run = {}
    for layer in range(layers):
        for tensor in ("key", "value"):
            run[Site(layer, tensor, stack)] = Entry(sizes, HEAD_AXES)
        run[Site(layer, "hidden", stack)] = Entry((sizes[0], sizes[2], channels), HIDDEN_AXES)
    return run


def output(name: str, shape: tuple[int, ...], axes: tuple[str, ...] = ()) -> Run:
    return {Site.output(name): Entry(shape, axes)}


def hidden_only(run: Run) -> Run:
    return {site: entry for site, entry in run.items() if site.tensor == "hidden"}


def change(run: Run, site: str, shape: tuple[int, ...], axes: tuple[str, ...] = ()) -> Run:
    return {**run, Site.parse(site): Entry(shape, axes)}


def pairs(alignment: Alignment) -> dict[str, tuple[str, str]]:
    return {str(p.reference): (str(p.candidate), str(p.layout)) for p in alignment.pairs}


def states(alignment: Alignment) -> dict[str, str]:
    return {u.site: u.state for u in alignment.unmatched}


def test_equal_addresses_pair_in_the_order_of_the_reference() -> None:
    """The candidate's own order does not matter, and nothing is done to its tensors."""
    reference = model()
    alignment = align(reference, dict(reversed(model().items())))
    assert [p.reference for p in alignment.pairs] == list(reference)
    assert all(p.candidate == p.reference and str(p.layout) == "" for p in alignment.pairs)
    assert alignment.unmatched == ()


def test_layer_1_is_not_layer_11() -> None:
    """Similar names never pair."""
    alignment = align(hidden_only(model(12)), {s: e for s, e in model(12).items() if s.layer != 1})
    assert states(alignment)["layers.1.hidden"] == "missing in candidate"
    assert len(alignment.pairs) == 11


def test_calls_pair_with_calls() -> None:
    """The second call of a layer is another site."""
    reference: Run = {Site(0, "hidden", call=n): Entry((1, T, C), HIDDEN_AXES) for n in (1, 2)}
    alignment = align(reference, {Site(0, "hidden"): Entry((1, T, C), HIDDEN_AXES)})
    assert states(alignment) == {"layers.0.hidden@2": "missing in candidate"}


def test_missing_in_candidate_names_the_likely_output() -> None:
    """As a suggestion with the line to write, never as a pair."""
    candidate = {s: e for s, e in model().items() if str(s) != "layers.1.hidden"} | output(
        "add_17", (B, T, C)
    )
    alignment = align(model(), candidate)
    (missing, extra) = alignment.unmatched
    assert (missing.site, missing.state) == ("layers.1.hidden", "missing in candidate")
    assert "output.add_17 has shape [1, 7, 12]" in missing.suggestion
    assert '[sources.NAME.sites] "layers.1.hidden" = "add_17"' in missing.suggestion
    assert (extra.site, extra.state) == ("output.add_17", "missing in reference")


def test_no_suggestion_where_nothing_is_spare() -> None:
    """A tensor that is already compared is not offered."""
    candidate = {s: e for s, e in model().items() if str(s) != "layers.1.hidden"}
    (missing,) = align(model(), candidate).unmatched
    assert missing.suggestion == ""


def test_a_spare_site_of_similar_name_but_other_shape_is_named() -> None:
    """So that a renamed output is found."""
    alignment = align(model() | output("logits", (B, T, 99)), model() | output("logits_0", (B, 1, 50)))
    assert "output.logits_0 has a similar name" in alignment.unmatched[0].suggestion


def test_shape_mismatch_names_axis_and_sizes() -> None:
    """Both shapes, and which axis differs."""
    alignment = align(model(), change(model(), "layers.1.key", (B, H, T + 1, D), HEAD_AXES))
    (mismatch,) = alignment.unmatched
    assert mismatch.state == "shape mismatch"
    assert "token 7 against 8" in mismatch.reason


def test_excluded_sites_are_reported_as_such() -> None:
    """On whichever side, each once."""
    alignment = align(
        model() | output("logits", (1, 2)),
        model() | output("extra", (1,)),
        exclude=("output.*", "layers.0.*"),
    )
    assert set(states(alignment).values()) == {"excluded"}
    assert sorted(states(alignment)) == [
        "layers.0.hidden",
        "layers.0.key",
        "layers.0.value",
        "output.extra",
        "output.logits",
    ]
    assert len(alignment.pairs) == 6


def test_overrides_map_a_candidate_site() -> None:
    """And the tensor that stood at the site is reported."""
    candidate = model() | output("k1", (B, T, H, D))
    alignment = align(model(), candidate, overrides={"output.k1": "layers.1.key"})
    assert pairs(alignment)["layers.1.key"] == (
        "output.k1",
        "heads after sequence; mapped by the configuration",
    )
    assert states(alignment) == {"layers.1.key": "excluded"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"output.k": "layers.0.key"}, "candidate has no site 'output.k'"),
        ({"layers.0.key": "layers.9.key"}, "reference has no site 'layers.9.key'; did you mean"),
        ({"layers.0.key": "layers.0.key", "layers.1.key": "layers.0.key"}, "two sites"),
    ],
)
def test_overrides_that_name_nothing(overrides: Mapping[str, str], message: str) -> None:
    """Are errors of the configuration."""
    with pytest.raises(ConfigurationError, match=message):
        align(model(), model(), overrides=overrides)


def test_single_stacks_of_other_names_match_with_a_note() -> None:
    """There is only one way to pair them."""
    alignment = align(model(stack=""), model(stack="decoder"))
    assert len(alignment.pairs) == 3 * L
    assert str(alignment.pairs[0].layout) == (
        "the only stack of each side: 'decoder' is the reference's unnamed one"
    )


@pytest.mark.parametrize("several", ["reference", "candidate"])
def test_the_only_stack_of_a_side_is_the_one_of_its_shape(several: str) -> None:
    """A probe may see a stack, such as one of convolutions, that another does not."""
    both = model(2, 40, stack="convolutions") | model(stack="encoder")
    sides = (both, model()) if several == "reference" else (model(), both)
    alignment = align(*sides)
    assert len(alignment.pairs) == 3 * L
    assert all({p.reference.stack, p.candidate.stack} == {"", "encoder"} for p in alignment.pairs)
    assert alignment.pairs[0].layout.note.startswith("the only stacks of one shape: ")


def test_of_several_stacks_of_one_shape_none_is_taken() -> None:
    both = model(stack="encoder") | model(stack="decoder")
    with pytest.raises(AlignmentError, match="nothing corresponds"):
        align(model(), both)


def test_several_stacks_are_not_guessed() -> None:
    """One candidate stack may be either."""
    reference = model(stack="encoder") | model(stack="decoder")
    alignment = align(reference, model(stack="encoder") | model(stack="text"))
    assert {u.state for u in alignment.unmatched if "decoder" in u.site} == {"missing in candidate"}


WORDS = [
    ("layers.1.key", (B, T, H, D), ("batch", "token", "head", "channel"), "heads after sequence"),
    ("layers.1.key", (B, T, H, D), (), "heads after sequence"),
    ("layers.1.key", (H, T, D), (), "batch axis of size 1 added"),
    ("layers.1.key", (B, T, H * D), ("batch", "token", "channel"), "2 heads folded into the channels"),
    ("layers.1.key", (B, T, H * D), (), "2 heads folded into the channels"),
    ("layers.1.key", (B, 3 * H, T, D), HEAD_AXES, "heads repeated 3 times"),
    ("layers.1.key", (B, T, 3 * H, D), (), "heads repeated 3 times"),
    ("layers.1.hidden", (T, C), (), "batch axis of size 1 added"),
    ("layers.1.hidden", (T, B, C), (), ""),
    ("layers.1.hidden", (T, B, C), ("token", "batch", "channel"), "axes in the order sequence, batch"),
    ("layers.1.hidden", (B, 1, T, C), (), "axis 1 of size 1 dropped"),
]


@pytest.mark.parametrize(("site", "shape", "axes", "words"), WORDS)
def test_layouts_in_words(site: str, shape: tuple[int, ...], axes: tuple[str, ...], words: str) -> None:
    """Each says what was done, and gives the reference's shape as a view."""
    reference = model()
    alignment = align(reference, change(model(), site, shape, axes))
    assert alignment.unmatched == ()
    pair = next(p for p in alignment.pairs if str(p.reference) == site)
    assert words in str(pair.layout)
    tensor = torch.arange(float(torch.Size(shape).numel())).view(shape)
    result = pair.layout.apply(tensor)
    assert tuple(result.shape) == reference[pair.reference].shape
    assert result.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def test_queries_are_never_taken_for_repeated() -> None:
    """More query heads are another model, not grouped-query attention unrolled."""
    reference = {**model(), Site(0, "query"): Entry((B, H, T, D), HEAD_AXES)}
    alignment = align(reference, {**reference, Site(0, "query"): Entry((B, 2 * H, T, D), HEAD_AXES)})
    assert states(alignment) == {"layers.0.query": "shape mismatch"}


def test_repeated_heads_are_told_to_the_caller() -> None:
    """Who must check that they are equal."""
    alignment = align(model(), change(model(), "layers.0.key", (B, 3 * H, T, D), HEAD_AXES))
    repeats = alignment.pairs[0].layout.repeats
    assert repeats is not None
    assert (repeats.axis, repeats.repeats) == (1, 3)
    assert alignment.pairs[1].layout.repeats is None


def test_heads_that_are_all_alike_are_compared_with_each_of_the_references() -> None:
    """A probe that undoes the repetition of heads cannot tell zeros of two heads from those of one."""
    alignment = align(model(), change(model(), "layers.0.key", (B, 1, T, D), HEAD_AXES))
    layout = alignment.pairs[0].layout
    tensor = torch.arange(B * T * D).reshape(B, 1, T, D)
    assert torch.equal(layout.apply(tensor), tensor.expand(B, H, T, D))
    assert str(layout) == f"{H} key/value heads of the reference compared with each of the candidate's"
    uneven = align(model(), change(model(), "layers.0.key", (B, H + 1, T, D), HEAD_AXES))
    assert states(uneven) == {"layers.0.key": "shape mismatch"}


def test_heads_and_tokens_of_one_size_are_ambiguous() -> None:
    """Even where the shapes are equal; naming the axes resolves it."""
    reference = model(sizes=(1, 4, 4, D))
    candidate = change(reference, "layers.1.key", (1, 4, 4, D))
    (unclear,) = align(reference, candidate).unmatched
    assert unclear.state == "shape mismatch"
    assert "ambiguous" in unclear.reason
    assert "[sources.NAME.axes]" in unclear.reason
    named = align(reference, candidate, axes={"layers.1.key": ("batch", "token", "head", "channel")})
    assert pairs(named)["layers.1.key"][1] == "heads after sequence"


def test_axes_that_do_not_fit_are_a_configuration_error() -> None:
    """The message gives the names there are."""
    with pytest.raises(ConfigurationError, match="batch, head, token, channel, layer, pair"):
        align(model(), model(), axes={"layers.1.key": ("batch", "time", "head", "channel")})


def test_outputs_without_axes_pair_by_name() -> None:
    """As they are if equal in shape, whatever the sizes; axes of size 1 may come or go."""
    reference = model() | output("square", (4, 4)) | output("logits", (1, T, 99)) | output("turned", (3, 8))
    candidate = model() | output("square", (4, 4)) | output("logits", (T, 99)) | output("turned", (8, 4))
    alignment = align(reference, candidate)
    assert pairs(alignment)["output.square"] == ("output.square", "")
    assert "of size 1 added" in pairs(alignment)["output.logits"][1]
    assert states(alignment) == {"output.turned": "shape mismatch"}


N = 6
"""Heads of the stacks: not two, so that no axis of heads may be one of key and value."""

STACKS = [
    ({"keys": (L, B, N, T, D), "values": (L, B, N, T, D)}, "axis 0 of output.keys is the layer"),
    ({"keys": (B, L, N, T, D), "values": (B, L, N, T, D)}, "axis 1 of output.keys is the layer"),
    ({"k_cache": (L, T, N, D), "v_cache": (L, T, N, D)}, "axis 0 of output.k_cache is the layer"),
    ({"past_keys": (L, B, T, N, D), "past_values": (L, B, T, N, D)}, "heads after sequence"),
    ({"key_cache": (L, B, T, N * D), "value_cache": (L, B, T, N * D)}, "folded into the channels"),
    ({"kv_cache": (L, 2, B, N, T, D)}, "axis 1 of output.kv_cache is the choice of key or value"),
    ({"past_key_values": (2, L, B, T, N, D)}, "axis 1 of output.past_key_values is the layer"),
    ({"present": (L, 2, N, T, D)}, "batch axis of size 1 added"),
]


@pytest.mark.parametrize(("outputs", "words"), STACKS)
def test_stacked_keys_and_values_are_taken_apart(outputs: Mapping[str, tuple[int, ...]], words: str) -> None:
    """Along the axis of the layers, each entry once."""
    reference = model(sizes=(B, N, T, D))
    candidate = hidden_only(reference)
    tensors = {}
    for i, (name, shape) in enumerate(outputs.items()):
        candidate |= output(name, shape)
        tensors[name] = i * 10**6 + torch.arange(torch.Size(shape).numel()).view(shape)
    alignment = align(reference, candidate)
    assert alignment.unmatched == ()
    assert words in pairs(alignment)["layers.1.key"][1]
    seen: list[int] = []
    for pair in alignment.pairs:
        if pair.reference.tensor != "hidden":
            part = pair.layout.apply(tensors[pair.candidate.tensor])
            assert tuple(part.shape) == (B, N, T, D)
            seen += part.flatten().tolist()
    assert sorted(seen) == sorted(x for tensor in tensors.values() for x in tensor.flatten().tolist())


def test_interleaved_keys_come_before_their_values() -> None:
    """Entry 0 of a pair is the key, in each layer its own."""
    reference = model(sizes=(B, N, T, D))
    candidate = hidden_only(reference) | output("kv_cache", (L, 2, B, N, T, D))
    cache = torch.arange(2 * L).view(L, 2, 1, 1, 1, 1).expand(L, 2, B, N, T, D)
    for pair in align(reference, candidate).pairs:
        if pair.reference.tensor != "hidden":
            assert pair.reference.layer is not None
            expected = 2 * pair.reference.layer + (pair.reference.tensor == "value")
            assert set(pair.layout.apply(cache).flatten().tolist()) == {expected}


def test_stacked_hidden_states() -> None:
    """Also where the layers come second."""
    candidate = output("hidden_states", (B, L, T, C))
    alignment = align(hidden_only(model()), candidate)
    assert {w for _, w in pairs(alignment).values()} == {"axis 1 of output.hidden_states is the layer"}
    states_ = torch.arange(L).view(1, L, 1, 1).expand(B, L, T, C)
    assert [set(p.layout.apply(states_).flatten().tolist()) for p in alignment.pairs] == [{0}, {1}, {2}]


def test_as_many_layers_as_heads_is_no_riddle() -> None:
    """No runtime puts the layers behind the heads (GPT-2 has 12 of each)."""
    reference = model(H)
    candidate = hidden_only(reference) | output("keys", (H, B, H, T, D)) | output("values", (H, B, H, T, D))
    assert "axis 0 of output.keys" in pairs(align(reference, candidate))["layers.1.key"][1]


def test_as_many_layers_as_batches_is() -> None:
    """Both orders are in use."""
    reference = model(2, sizes=(2, 3, T, D))
    candidate = hidden_only(reference) | output("keys", (2, 2, 3, T, D))
    alignment = align(reference, candidate)
    unclear = next(u for u in alignment.unmatched if u.site == "layers.0.key")
    assert (unclear.state, "ambiguous" in unclear.reason) == ("shape mismatch", True)
    named = align(reference, candidate, axes={"output.keys": ("layer", *HEAD_AXES)})
    assert pairs(named)["layers.1.key"][1] == "axis 0 of output.keys is the layer"


def test_own_sites_come_before_stacks() -> None:
    """A stack is taken apart only for what the candidate lacks."""
    alignment = align(model(), model() | output("keys", (L, B, H, T, D)))
    assert pairs(alignment)["layers.0.key"] == ("layers.0.key", "")
    assert states(alignment) == {"output.keys": "missing in reference"}


def test_outputs_of_telling_names_that_stack_nothing() -> None:
    """Are no stack: the sites are missing, and the reason says what was looked at."""
    candidate = hidden_only(model()) | output("keys", (4, 4)) | output("last_hidden_state", (1, T, C))
    alignment = align(model(), candidate)
    missing = next(u for u in alignment.unmatched if u.site == "layers.0.key")
    assert missing.state == "missing in candidate"
    assert "output.keys" in missing.reason


def test_an_output_with_named_axes_and_no_layers_is_no_stack() -> None:
    """Pooled hidden states have the shape of one layer, not of all."""
    candidate = {s: e for s, e in model().items() if s.tensor != "hidden"} | output(
        "hidden", (B, T, C), HIDDEN_AXES
    )
    assert states(align(model(), candidate))["layers.0.hidden"] == "missing in candidate"


def test_different_models_are_refused() -> None:
    """Both sides are named with what tells them apart."""
    with pytest.raises(AlignmentError, match="4 layers of 64 channels, the reference 30 of 576: these are"):
        align(model(30, 576), model(4, 64))


def test_models_of_another_width_are_refused_though_their_outputs_fit() -> None:
    logits = output("logits", (B, T, 50))
    narrow = model(channels=6, sizes=(B, H, T, 3)) | logits
    with pytest.raises(AlignmentError, match="has 3 layers of 6 channels, the reference 3 of 12"):
        align(model() | logits, narrow)
    assert len(align(model() | logits, narrow, exclude=["layers.*"]).pairs) == 1
    same_keys = model(channels=6) | logits
    assert len(align(model() | logits, same_keys).pairs) == 2 * L + 1


def test_runs_on_different_inputs_are_refused() -> None:
    """Same model, another number of tokens: the first site is shown."""
    with pytest.raises(AlignmentError, match=r"layers.0.key .*token 7 against 9"):
        align(model(), model(sizes=(B, H, 9, D)))


def test_nothing_in_common_is_refused() -> None:
    """Both sides are listed."""
    with pytest.raises(AlignmentError, match=r"layers.0.key, .* and 6 more, the candidate output.x"):
        align(model(), output("x", (1,)))


@pytest.mark.parametrize(("reference", "candidate"), [({}, model()), (model(), {})])
def test_empty_sides_are_refused(reference: Run, candidate: Run) -> None:
    """Which one is said."""
    with pytest.raises(AlignmentError, match=r"the (reference|candidate) has no sites"):
        align(reference, candidate)


def test_excluding_everything_is_refused() -> None:
    """Nothing compared is never a pass."""
    with pytest.raises(AlignmentError, match="every site of the reference is excluded"):
        align(model(), model(), exclude=("*",))


@SETTINGS
@given(distinct_sizes(5), st.data())
def test_layouts_invert_any_stacking(sizes: tuple[int, ...], data: st.DataObject) -> None:
    """Permuted, stacked, batch dropped, axes named or not: what comes out is what went in, exactly."""
    layers, heads, tokens, channels, batch = sizes
    batch = data.draw(st.sampled_from((1, batch)))
    shape = (batch, heads, tokens, channels)
    reference = {Site(i, "key"): Entry(shape, HEAD_AXES) for i in range(layers)}
    truth = torch.arange(layers * batch * heads * tokens * channels).view(layers, *shape)
    names: tuple[str, ...] = ("layer", *HEAD_AXES)
    known = data.draw(st.booleans())
    orders: Any = st.permutations(range(5)) if known else st.sampled_from(_USUAL)
    order = tuple(data.draw(orders))
    stacked, names = truth.permute(order), tuple(names[i] for i in order)
    if batch == 1 and data.draw(st.booleans()):
        stacked = stacked.squeeze(names.index("batch"))
        names = tuple(name for name in names if name != "batch")
    alignment = align(reference, output("keys", tuple(stacked.shape), names if known else ()))
    assert [p.reference for p in alignment.pairs] == list(reference)
    for layer, pair in enumerate(alignment.pairs):
        assert torch.equal(pair.layout.apply(stacked), truth[layer])


_USUAL = (
    (0, 1, 2, 3, 4),
    (0, 1, 3, 2, 4),
    (1, 0, 2, 3, 4),
    (1, 0, 3, 2, 4),
    (0, 3, 1, 2, 4),
    (3, 1, 0, 2, 4),
)


@SETTINGS
@given(
    sizes=distinct_sizes(4), order=st.permutations(range(4)), repeats=st.integers(1, 3), known=st.booleans()
)
def test_layouts_invert_permuted_and_repeated_heads(
    sizes: tuple[int, ...], order: list[int], repeats: int, *, known: bool
) -> None:
    """The first of each run of equal heads is what went in."""
    assume(known or repeats == 1)
    reference = {Site(0, "value"): Entry(sizes, HEAD_AXES)}
    truth = torch.arange(torch.Size(sizes).numel()).view(sizes)
    brought = truth.repeat_interleave(repeats, 1).permute(order)
    names = tuple(HEAD_AXES[i] for i in order) if known else ()
    alignment = align(reference, {Site(0, "value"): Entry(tuple(brought.shape), names)})
    assert torch.equal(alignment.pairs[0].layout.apply(brought), truth)


@SETTINGS
@given(sizes=distinct_sizes(4), known=st.booleans())
def test_layouts_invert_folded_heads(sizes: tuple[int, ...], *, known: bool) -> None:
    """`[b, t, h * d]` gives back `[b, h, t, d]`."""
    reference = {Site(0, "key"): Entry(sizes, HEAD_AXES)}
    truth = torch.arange(torch.Size(sizes).numel()).view(sizes)
    folded = truth.transpose(1, 2).flatten(2)
    names = HIDDEN_AXES if known else ()
    alignment = align(reference, {Site(0, "key"): Entry(tuple(folded.shape), names)})
    assert torch.equal(alignment.pairs[0].layout.apply(folded), truth)


def two_stacks(tokens: tuple[int, int] = (T, T + 2), layers: tuple[int, int] = (L, L)) -> Run:
    """An encoder and a decoder, whose tokens or layers may tell them apart."""
    run: Run = {}
    for stack, count, size in zip(("encoder", "decoder"), layers, tokens, strict=True):
        run |= model(count, stack=stack, sizes=(B, N, size, D))
    return run


def without_keys(run: Run) -> Run:
    return {site: entry for site, entry in run.items() if site.tensor != "key"}


def test_an_output_named_after_one_of_several_stacks_is_taken_apart_as_that_one() -> None:
    """Whatever the shapes: both stacks have the same here."""
    reference = two_stacks((T, T))
    candidate = without_keys(reference)
    for stack in ("decoder", "encoder"):
        candidate |= output(f"{stack}_keys", (B, L, N, T, D))
    alignment = align(reference, candidate)
    assert alignment.unmatched == ()
    for stack in ("encoder", "decoder"):
        for layer in range(L):
            found, words = pairs(alignment)[f"{stack}.layers.{layer}.key"]
            assert (found, words) == (
                f"output.{stack}_keys",
                f"axis 1 of output.{stack}_keys is the layer",
            )
    layers = torch.arange(L).view(1, L, 1, 1, 1).expand(B, L, N, T, D)
    taken = [p for p in alignment.pairs if p.reference.tensor == "key"]
    assert [set(p.layout.apply(layers).flatten().tolist()) for p in taken] == [{0}, {1}, {2}] * 2


@pytest.mark.parametrize(
    ("tokens", "layers", "shape"),
    [
        ((T, T + 2), (L, L), (B, L, N, T + 2, D)),
        ((T, T), (L, L + 2), (B, L + 2, N, T, D)),
    ],
    ids=["tokens", "layers"],
)
def test_sizes_tell_the_stack_of_an_output_that_names_none(
    tokens: tuple[int, int], layers: tuple[int, int], shape: tuple[int, ...]
) -> None:
    """Only the decoder's fit, and the layout says so; the encoder's keys stay missing, with the reason."""
    reference = two_stacks(tokens, layers)
    alignment = align(reference, without_keys(reference) | output("keys", shape))
    assert {s for s in pairs(alignment) if s.endswith("key")} == {
        f"decoder.layers.{i}.key" for i in range(layers[1])
    }
    assert "by its shape, the layers of 'decoder'" in pairs(alignment)["decoder.layers.0.key"][1]
    assert states(alignment) == {f"encoder.layers.{i}.key": "missing in candidate" for i in range(layers[0])}
    assert all(f"output.keys: reference [1, 6, {T}, 5]" in u.reason for u in alignment.unmatched)


def test_an_output_that_fits_several_stacks_is_not_guessed() -> None:
    """The reason names both, and how to tell them apart."""
    reference = two_stacks((T, T))
    alignment = align(reference, without_keys(reference) | output("keys", (B, L, N, T, D)))
    assert states(alignment) == {
        f"{stack}.layers.{i}.key": "shape mismatch" for stack in ("encoder", "decoder") for i in range(L)
    }
    (reason, *_) = {u.reason for u in alignment.unmatched if u.site.startswith("decoder")}
    assert reason == (
        "output.keys: its shape [1, 3, 6, 7, 5] fits the layers of 'decoder' and of 'encoder'; "
        "name the output after its stack when exporting, such as 'decoder_keys'"
    )


def test_crossed_keys_belong_to_the_only_stack_that_has_some() -> None:
    """The encoder has no cross attention, though its keys have the same shape."""
    reference = two_stacks((T, T))
    crossed: Run = {Site(i, "cross_key", "decoder"): Entry((B, N, T, D), HEAD_AXES) for i in range(L)}
    alignment = align(reference | crossed, reference | output("cross_keys", (L, B, N, T, D)))
    assert alignment.unmatched == ()
    assert "output.cross_keys" in pairs(alignment)["decoder.layers.2.cross_key"][0]


def test_outputs_of_other_names_pair_where_each_is_the_only_one_of_its_shape() -> None:
    reference = model() | output("0", (1, 7, 50)) | output("1", (1, 7, 3))
    candidate = model() | output("logits", (1, 7, 50)) | output("scores", (1, 7, 3))
    found = pairs(align(reference, candidate))
    said = "the only output of its shape on each side"
    assert found["output.0"] == ("output.logits", f"output.logits, {said}")
    assert found["output.1"] == ("output.scores", f"output.scores, {said}")


@pytest.mark.parametrize(
    "candidate",
    [
        output("a", (1, 7, 50)) | output("b", (1, 7, 50)),  # which one?
        output("a", (1, 50, 7)),  # another layout
        output("1", (1, 7, 50)),  # the reference has that name
    ],
)
def test_outputs_that_could_be_others_do_not_pair(candidate: Run) -> None:
    reference = model() | output("0", (1, 7, 50)) | output("1", (1, 7, 50, 1))
    alignment = align(reference, model() | candidate)
    assert states(alignment)["output.0"] == "missing in candidate"
