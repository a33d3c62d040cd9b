from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from divergence.probes import Description, SiteInfo
from divergence.reports.terminal import render, render_description, render_error
from divergence.result import (
    METRICS,
    Cause,
    Comparison,
    FirstDivergence,
    Policy,
    Profile,
    SiteResult,
    Unmatched,
)
from divergence.sites import Site
from tests.reports import cases

FLOOR = 1e-3


def site(
    layer: int | None,
    tensor: str,
    ratio: float | None = 1.0,
    *,
    stack: str = "",
    call: int = 1,
    **changes: Any,
) -> SiteResult:
    """A site whose error is `ratio` times its floor; over 4 fails."""
    error = None if ratio is None else ratio * FLOOR
    values: dict[str, Any] = {
        "rel_l2": error,
        "row_rel_l2": error,
        "floor": FLOOR,
        "ratio": ratio,
        "verdict": "fail" if ratio is not None and ratio > 4 else "pass",
        "ref_min": -35.0,
        "ref_max": 40.0,
        "cand_min": -35.0,
        "cand_max": 40.0,
    }
    name = str(Site(layer, tensor, stack, call))
    return SiteResult(name, stack, layer, tensor, call, **{**values, **changes})


def comparison(*sites: SiteResult, **changes: Any) -> Comparison:
    bare: dict[str, Any] = {"candidate": "model.onnx", "environment": {}, "command": ""}
    return cases.comparison(*sites, **{**bare, **changes})


def layers(count: int, failing: dict[int, float] | None = None, **where: Any) -> list[SiteResult]:
    return [
        site(n, tensor, (failing or {}).get(n, 1.3 if tensor == "hidden" else 1.0), **where)
        for n in range(count)
        for tensor in ("key", "value", "hidden")
    ]


def rows(text: str) -> list[str]:
    """Lines of the layer table that begin with a layer's number."""
    return [line.split()[0] for line in text.splitlines() if line[:7].strip().isdigit()]


def test_the_verdict_comes_first() -> None:
    assert render(comparison(*layers(2))).splitlines()[0] == "PASS  in a word"
    assert render(comparison(*layers(2, {1: 9.0}))).splitlines()[0] == "FAIL  in a word"
    error = comparison(verdict="error", reason="no site could be compared")
    assert render(error).splitlines()[0] == "ERROR  no site could be compared"


def test_a_verdict_without_a_reason_gets_one() -> None:
    assert render(comparison(reason="")).splitlines()[0] == "PASS  no site could be compared"
    assert render(comparison(*layers(1), reason="")).startswith("PASS  every site is within its limits\n")


def test_the_first_divergence_is_told_as_figure_against_limit() -> None:
    text = render(comparison(*layers(12), site(12, "value", 21.0)))
    assert "  layers.12.value:  error 2.1e-2 is 21x the noise floor of 1.0e-3 (limit 4x)" in text.splitlines()


def test_an_introduced_error_is_told_apart_from_what_came_in() -> None:
    replayed: dict[str, Any] = {"introduced": 2e-3, "introduced_floor": 1e-4, "introduced_ratio": 20.0}
    after: dict[str, Any] = {
        "introduced": 1e-4,
        "introduced_floor": 1e-4,
        "introduced_ratio": 1.0,
        "verdict": "pass",
    }
    text = render(comparison(site(3, "hidden", 9.0, **replayed), site(4, "hidden", 8.0, **after)))
    assert "layers.3.hidden:  introduces an error of 2.0e-3, 20x its own noise floor of 1.0e-4" in text
    assert "  accumulated  error 9.0e-3, 9.0x its floor of 1.0e-3" in text
    assert "  carried on   by 1 site, over the limit through no error of their own (propagated)" in text


def test_a_ratio_of_the_median_token_is_said_to_be_one() -> None:
    """Under a massive activation the whole tensor's error over its floor explains nothing."""
    text = render(comparison(site(0, "key", 50.0, rel_l2=1e-5, row_rel_l2=2e-3)))
    assert "error 2.0e-3 is 50x the noise floor at the median token or channel (limit 4x)" in text


def test_the_limit_of_a_single_site_is_the_one_shown() -> None:
    policy = Policy("noise-floor", 4.0, sites={"layers.*.key": {"ratio": 10.0}})
    text = render(comparison(site(0, "key", 12.0), policy=policy))
    assert "is 12x the noise floor of 1.0e-3 (limit 10x)" in text


def test_absolute_limits_are_told_with_metric_and_direction() -> None:
    policy = Policy("absolute", 4.0, sites={"layers.*.key": {"cosine": 0.999, "mse": 1e-5}})
    bad: dict[str, Any] = {"cosine": 0.99897, "mse": 2e-4, "floor": None, "verdict": "fail"}
    text = render(comparison(site(0, "key", None, **bad), site(1, "key", None, **bad), policy=policy))
    assert "cosine 0.99897 is below the limit 0.999; mse 0.0002 is above the limit 1e-5" in text
    assert "  limits     layers.*.key: cosine >= 0.999, mse <= 1e-5" in text.splitlines()
    assert "  judged by  absolute limits" in text.splitlines()
    assert "More failing sites\n  layers.1.key  cosine 0.99897 is below" in text


def test_causes_carry_evidence_share_and_fix() -> None:
    cause = Cause(
        "rotary", "Rotary angles in bf16", ("error grows with position", "V is fine"), 0.9996, "use fp32"
    )
    text = render(comparison(site(0, "key", 50.0), causes=(cause,)))
    assert "  1.  Rotary angles in bf16 (explains 99.96 % of the error at layers.0.key)" in text
    assert (
        "     evidence  error grows with position\n               V is fine\n     fix       use fp32" in text
    )


def test_every_layer_has_a_row_with_error_ratio_and_mark() -> None:
    lines = render(comparison(*layers(3, {1: 21.0}))).splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("  layer "))
    assert lines[header].split() == ["layer", "key", "value", "hidden", "1e-3", "1e-1"]
    assert lines[header + 1].startswith("      0    1.0e-3    1.0x ✓    1.0e-3    1.0x ✓    1.3e-3    1.3x ✓")
    assert lines[header + 2].startswith("      1    2.1e-2     21x ✗    2.1e-2     21x ✗    2.1e-2     21x ✗")
    assert "█" in lines[header + 2]


def test_the_bar_grows_with_the_error_and_ticks_the_floor() -> None:
    text = render(
        comparison(*(site(n, "hidden", 10.0 ** (n / 2), verdict="pass", floor=3e-3) for n in range(4)))
    )
    bars = [line[30:] for line in text.splitlines() if line[:7].strip().isdigit()]
    assert [len(bar) for bar in bars] == sorted(len(bar) for bar in bars)
    assert len({bar.index("│") for bar in bars}) == 1


def test_ascii_uses_no_other_character() -> None:
    text = render(comparison(*layers(60, {30: 9.0}), reference="Modell-für-Ü"), ascii=True)
    assert text.isascii()
    assert "9.0x X" in text
    assert "1.0x +" in text
    assert "reference    Modell-f\\xfcr-\\xdc" in text


def test_a_table_of_forty_layers_is_whole() -> None:
    assert rows(render(comparison(*layers(40)))) == [str(n) for n in range(40)]


def test_of_eighty_layers_the_passing_middle_is_folded() -> None:
    text = render(comparison(*layers(80)))
    assert rows(text) == [str(n) for n in (*range(5), 77, 78, 79)]
    assert "       … layers 5 to 76: all pass, worst ratio 1.3x" in text.splitlines()


def test_failing_layers_are_never_folded() -> None:
    failing = {20: 9.0, 50: 5.0, 51: 6.0}
    text = render(comparison(*layers(80, failing)))
    shown = (*range(5), 19, 20, 21, *range(49, 53), 77, 78, 79)
    assert rows(text) == [str(n) for n in shown]
    assert "… layers 5 to 18: all pass, worst ratio 1.3x" in text
    assert rows(render(comparison(*layers(80, dict.fromkeys(range(80), 9.0))))) == [str(n) for n in range(80)]


def test_a_layer_that_could_not_be_judged_is_not_folded_as_passing() -> None:
    sites = [s if s.layer != 40 else dataclasses.replace(s, verdict="error") for s in layers(80)]
    assert "40" in rows(render(comparison(*sites)))


def test_stacks_and_calls_have_titles() -> None:
    text = render(
        comparison(
            *layers(2, stack="vision"),
            *layers(2, stack="expert"),
            *layers(2, stack="expert", call=2),
        )
    )
    titles = [line.strip() for line in text.splitlines() if line.startswith("  stack ")]
    assert titles == ["stack vision", "stack expert", "stack expert, call 2"]
    assert rows(text) == ["0", "1"] * 3


def test_calls_of_a_single_stack_have_titles() -> None:
    text = render(comparison(*layers(1), *layers(1, call=2)))
    assert [line for line in text.splitlines() if line.startswith("  call ")] == ["  call 1", "  call 2"]


def test_without_hidden_states_the_chart_is_of_the_key() -> None:
    text = render(comparison(*(site(n, t) for n in range(3) for t in ("key", "value"))))
    assert "bars: accumulated error of key, logarithmic; │ its noise floor" in text
    assert "hidden" not in text


def test_detail_tensors_get_a_table_of_their_own() -> None:
    text = render(comparison(site(0, "query"), site(0, "key"), site(0, "mlp", 9.0), site(0, "hidden")))
    headers = [line.split()[:4] for line in text.splitlines() if line.startswith("  layer ")]
    assert headers == [["layer", "key", "hidden", "1e-3"], ["layer", "query", "mlp"]]
    assert rows(text) == ["0", "0"]


def test_a_model_with_outputs_only_has_no_layer_table() -> None:
    text = render(comparison(site(None, "logits", max_abs=0.047), site(None, "action", 9.0)))
    assert "Layers" not in text
    assert "  output.logits  ✓ error 1.0e-3  1.0x the floor  difference at most 0.047" in text.splitlines()
    assert "  output.action  ✗ error 9.0e-3  9.0x the floor" in text


def test_an_output_that_only_passes_on_an_error_shows_both_figures() -> None:
    replayed = site(
        None, "logits", 9.0, verdict="pass", introduced=1e-4, introduced_floor=1e-4, introduced_ratio=1.0
    )
    assert "  output.logits  ✓ adds 1.0e-4  1.0x the floor  accumulated 9.0e-3" in render(
        comparison(replayed)
    )


def test_nan_is_counted_before_anything_else() -> None:
    broken = site(0, "hidden", math.nan, cand_nonfinite=12, verdict="fail")
    text = render(comparison(site(0, "key"), broken))
    assert "layers.0.hidden:  12 values are NaN or Inf (in the reference 0)" in text
    assert "NaN/Inf         ✗   NaN or Inf" in text


def test_equal_bits_are_said_to_be_equal() -> None:
    equal = [dataclasses.replace(s, bit_equal=True, rel_l2=0.0, ratio=None, floor=None) for s in layers(31)]
    text = render(comparison(*equal))
    assert "all 93 sites equal to the bit" in text
    assert "  equal         ✓" in text
    assert "93 sites compared, 1 equal to the bit" in render(comparison(*layers(31)[1:], equal[0]))


def test_unmatched_sites_come_with_state_reason_and_suggestion() -> None:
    missing = Unmatched("layers.3.key", "missing in candidate", "no output of that name", "map it")
    text = render(comparison(*layers(1), unmatched=(missing,)))
    assert "  layers.3.key  missing in candidate: no output of that name; map it" in text.splitlines()
    assert "3 sites compared, 1 unmatched" in text


def test_many_unmatched_sites_are_counted() -> None:
    missing = tuple(Unmatched(f"layers.{n}.key", "missing in candidate", "gone") for n in range(25))
    text = render(comparison(*layers(1), unmatched=missing))
    assert text.count("missing in candidate: gone") == 20
    assert "5 more missing in candidate; report.json names them all" in text


def test_excluded_sites_are_named_and_not_called_unmatched() -> None:
    excluded = tuple(Unmatched(f"layers.{n}.key", "excluded", "by 'layers.*.key'") for n in range(2))
    text = render(comparison(*layers(1), unmatched=excluded))
    assert "  -  layers.0.key, layers.1.key (by 'layers.*.key')" in text.splitlines()
    assert "Unmatched" not in text
    assert "1 unmatched" not in text


def test_zeros_are_remarked_as_a_run_of_layers() -> None:
    zeros: dict[str, Any] = {"cand_min": 0.0, "cand_max": 0.0}
    text = render(comparison(*(site(n, "key", **(zeros if n >= 2 else {})) for n in range(18))))
    assert "layers.2.key to layers.17.key (16 layers): the candidate is all zero where the" in text


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-12.0, 12.0, "the candidate has collapsed to [-12, 12] where the reference spans [-35, 40]"),
        (-120.0, 120.0, "the candidate has grown to [-120, 120] where the reference spans [-35, 40]"),
        (3.0, 3.0, "the candidate is constant at 3 where the reference spans [-35, 40]"),
    ],
)
def test_gross_differences_of_range_are_remarked(low: float, high: float, said: str) -> None:
    text = render(comparison(site(0, "key", cand_min=low, cand_max=high)))
    assert f"  -  layers.0.key: {said}" in text.splitlines()
    assert "Remarks" not in render(comparison(site(0, "key", cand_min=-29.5, cand_max=38.75)))


def test_differences_at_padding_are_shown_apart() -> None:
    text = render(comparison(site(0, "key", padded_max_abs=3.1), site(1, "key", padded_max_abs=0.0)))
    assert "padded tokens differ by up to 3.1 (layers.0.key); they count for nothing else" in text


def test_what_could_not_be_judged_says_why() -> None:
    broken = site(0, "key", None, verdict="error", reason="the reference itself overflows here")
    text = render(comparison(broken, site(0, "hidden"), verdict="error"))
    assert "Not judged\n  layers.0.key  the reference itself overflows here" in text


def test_infinities_that_no_consumer_saw_are_remarked() -> None:
    unseen = site(0, "key", cand_nonfinite=2, reason="runs in fp32 on this provider")
    assert "layers.0.key: runs in fp32 on this provider" in render(comparison(unseen))


def test_the_error_by_token_of_the_first_divergence_is_drawn() -> None:
    grows = Profile(token=tuple(n / 64 for n in range(64)))
    text = render(comparison(site(0, "key", 50.0, profile=grows)))
    line = next(line for line in text.splitlines() if line.startswith("  by token"))
    drawn = line.split()[2]
    assert len(drawn) == 64
    assert drawn == "".join(sorted(drawn))


def test_run_notes_and_contract_are_shown() -> None:
    text = render(
        comparison(
            *layers(1),
            notes=("TF32 was on.",),
            contract={"keys": {"dtype": "float16"}},
            environment={"python": "3.11", "reference": {"torch": "2.9"}, "sizes": [1, 2]},
            command="divergence compare --ref a",
        )
    ).splitlines()
    assert "  -  TF32 was on." in lines_of("Notes", text)
    assert "  keys  dtype float16" in lines_of("Contract between host and engine", text)
    assert "  environment  python 3.11, reference (torch 2.9), sizes [1, 2]" in lines_of("Run", text)
    assert "  command      divergence compare --ref a" in lines_of("Run", text)


def lines_of(title: str, lines: list[str]) -> list[str]:
    start = lines.index(title)
    end = next((i for i in range(start, len(lines)) if not lines[i]), len(lines))
    return lines[start:end]


def test_text_from_the_model_is_never_markup() -> None:
    name = "[red]x[/red]"
    text = render(
        comparison(
            SiteResult(f"output.{name}", "", None, name, 1, "fail", reason="[bold]r[/bold] :smile:"),
            reason=f"{name} is off",
            notes=("[link=http://x]note[/link]",),
            first_divergence=FirstDivergence(f"output.{name}", "", None, name),
        ),
        color=True,
    )
    for literal in (name, "[bold]r[/bold] :smile:", "[link=http://x]note[/link]"):
        assert literal in text


def test_control_characters_are_written_not_obeyed() -> None:
    text = render(comparison(reason="a\x1b[31mb\nc\u202ed"))
    assert text.splitlines()[0] == "PASS  a\\x1b[31mb c\\u202ed"
    assert render_error("bad \x1b[2J name") == "ERROR  bad \\x1b[2J name"


def test_color_changes_nothing_but_the_color() -> None:
    result = comparison(*layers(3, {1: 9.0}))
    colored = render(result, color=True)
    assert "\x1b[" in colored
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == render(result)


def test_the_environment_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    result = comparison(*layers(3, {1: 9.0}))
    expected = render(result)
    for name, value in {"COLUMNS": "50", "FORCE_COLOR": "1", "TERM": "dumb", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    assert render(result) == expected


def test_an_error_is_one_line_however_long() -> None:
    message = "/a/long/path" * 40 + ": not found"
    assert render_error(message) == f"ERROR  {message}"
    assert render_error("x", color=True) == "\x1b[1;33mERROR\x1b[0m  x"


def test_a_description_shows_every_site_and_operator() -> None:
    description = Description(
        "model.onnx",
        "onnx",
        "fp16",
        (SiteInfo(Site(0, "key"), "exporter metadata, node add_5", "float16", (1, "seq", 8)),),
        {"input_ids": "int64[1, seq]"},
        ("opset 20",),
        {"MatMul": {"float16": 12, "float32": 1}, "Add": {}},
    )
    lines = render_description(description).splitlines()
    assert lines[0] == "model.onnx"
    assert "  precision  fp16" in lines
    assert "  input_ids  int64[1, seq]" in lines
    assert "  layers.0.key  float16[1, seq, 8]  exporter metadata, node add_5" in lines
    assert "  MatMul  12 in float16, 1 in float32" in lines
    assert "  -  opset 20" in lines


def test_a_description_without_sites_says_so() -> None:
    text = render_description(Description("m", "onnx", None, (), {}))
    assert "Sites: none were found" in text
    assert "not shown by the source" in text


TEXT = st.text(max_size=30)
FIGURE = st.none() | st.floats()
STATES = ("missing in reference", "missing in candidate", "shape mismatch", "excluded", "matched")
SITES = st.builds(
    SiteResult,
    site=TEXT,
    stack=TEXT,
    layer=st.none() | st.integers(0, 99_999),
    tensor=st.sampled_from(("key", "value", "hidden", "mlp")) | TEXT,
    call=st.integers(1, 3),
    verdict=st.sampled_from(("pass", "fail", "error")),
    reason=TEXT,
    **dict.fromkeys(METRICS, FIGURE),
    **dict.fromkeys(("ref_min", "ref_max", "cand_min", "cand_max", "floor"), FIGURE),
    introduced_floor=FIGURE,
    cand_nonfinite=st.integers(0, 10**12),
    padded_max_abs=FIGURE,
    max_abs_at=st.none() | st.lists(st.integers(), max_size=5).map(tuple),
    bit_equal=st.booleans(),
    layout=TEXT,
    found_ref=TEXT,
    profile=st.builds(Profile, token=st.lists(st.floats(), max_size=64).map(tuple)),
)
POLICIES = st.builds(
    Policy,
    policy=st.sampled_from(("noise-floor", "absolute")),
    ratio=st.floats(0, allow_nan=False),
    judged=st.sampled_from(("introduced", "cumulative")),
    sites=st.dictionaries(
        st.sampled_from(("*", "layers.*.key")) | TEXT,
        st.dictionaries(st.sampled_from((*METRICS, "unheard-of")), st.floats(), max_size=3),
        max_size=3,
    ),
)
JSON = st.recursive(
    st.none() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def comparisons(draw: st.DrawFn) -> Comparison:
    sites = tuple(draw(st.lists(SITES, max_size=6)))
    first = draw(st.sampled_from(sites)) if sites else None
    return Comparison(
        verdict=draw(st.sampled_from(("pass", "fail", "error"))),
        reason=draw(TEXT),
        first_divergence=draw(
            st.none() | st.just(FirstDivergence(first.site if first else "x", "", None, ""))
        ),
        reference=draw(TEXT),
        candidate=draw(TEXT),
        policy=draw(POLICIES),
        sites=sites,
        unmatched=tuple(
            draw(st.lists(st.builds(Unmatched, TEXT, st.sampled_from(STATES), TEXT, TEXT), max_size=3))
        ),
        causes=tuple(
            draw(st.lists(st.builds(Cause, TEXT, TEXT, st.lists(TEXT).map(tuple), FIGURE, TEXT), max_size=2))
        ),
        notes=tuple(draw(st.lists(TEXT, max_size=2))),
        contract=draw(st.dictionaries(TEXT, JSON, max_size=2)),
        environment=draw(st.dictionaries(TEXT, JSON, max_size=3)),
        command=draw(TEXT),
    )


@settings(deadline=None, max_examples=150)
@given(comparisons(), st.integers(0, 140), st.booleans())
def test_any_comparison_renders_to_plain_lines_that_fit(
    result: Comparison, width: int, ascii_only: bool
) -> None:
    text = render(result, width=width, ascii=ascii_only)
    assert "\x1b" not in text
    assert not ascii_only or text.isascii()
    for line in text.split("\n"):
        assert line == line.rstrip()
        assert line == "" or line.isprintable()
        assert cell_len(line) <= max(width, 40), line
    assert text.startswith({"pass": "PASS", "fail": "FAIL", "error": "ERROR"}[result.verdict])


@settings(deadline=None, max_examples=40)
@given(comparisons())
def test_any_comparison_renders_in_color(result: Comparison) -> None:
    render(result, color=True)
