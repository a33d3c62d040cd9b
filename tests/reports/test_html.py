"""The page as text; `test_browser.py` opens it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html.parser
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from divergence.reports.html import render_html
from divergence.reports.html.blocks import blocks, flat
from divergence.result import METRICS, Cause, Comparison, Hypothesis
from tests.reports import cases


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text that a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.seen: list[str] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in self.raw:
            self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        (self.raw[self._inside] if self._inside else self.seen).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.seen).split())

    @property
    def data(self) -> Any:
        return json.loads(self.raw["script"][0])

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    return {name: Page(render_html(case)) for name, case in cases.CASES.items()}


@pytest.mark.parametrize("name", cases.CASES)
def test_a_page_needs_nothing_else(pages: dict[str, Page], name: str) -> None:
    """No element that would fetch anything, and no address but those within the page."""
    page = pages[name]
    assert not {tag for tag, _ in page.tags} & {"iframe", "object", "embed", "img", "audio", "video", "base"}
    for tag, attributes in page.tags:
        for attribute in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            value = attributes.get(attribute)
            assert value is None or value.startswith(("#", "data:")), (tag, attribute, value)
    assert "url(" not in "".join(page.raw["style"])
    assert "@import" not in "".join(page.raw["style"])


@pytest.mark.parametrize("name", cases.CASES)
def test_the_policy_allows_its_own_style_and_script_only(pages: dict[str, Page], name: str) -> None:
    page = pages[name]
    policy = next(
        str(m["content"]) for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy"
    )
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["script-src"] == f"'sha256-{digest(page.raw['script'][-1])}'"
    assert directives["style-src"] == f"'sha256-{digest(page.raw['style'][0])}'"
    assert "unsafe" not in policy
    # What the policy would block, and complain about on the console.
    for tag, attributes in page.tags:
        assert "style" not in attributes, tag
        assert not [a for a in attributes if a.startswith("on")], tag


def digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def test_names_from_the_model_stay_text(pages: dict[str, Page]) -> None:
    page = pages["evil"]
    assert not page.of("img")
    assert len(page.of("script")) == 2
    # Verdict, place, cause, fix, evidence, contract, notes, environment, command, unmatched, excluded, ...
    assert page.text.count(cases.EVIL) > 25
    assert page.data["sites"][0]["id"] == f"layers.0.{cases.EVIL}"
    title = render_html(cases.evil()).split("<title>")[1].split("</title>")[0]
    assert "<" not in title


ANY_TEXT = st.text(st.characters(), max_size=40)
"""With control characters and halves of surrogate pairs."""


@given(ANY_TEXT)
@example("\\2 \\A")
@example("url(#x) )")
@settings(max_examples=15)
def test_any_name_leaves_the_page_well_formed(name: str) -> None:
    """The same tags whatever the name is, and text that a file can hold."""

    def page(text: str) -> Page:
        output = dataclasses.replace(cases.site(None, "logits"), site=f"output.{text}", tensor=text)
        bad = dataclasses.replace(
            cases.site(0, "key", 9.0), site=f"b{text}", tensor=f"c{text}", stack=f"a{text}"
        )
        said = cases.comparison(
            bad,
            *cases.layers(2),
            output,
            candidate=text,
            notes=(text,),
            contract={"a": f"x{text}"},
            command=f"x{text}",
        )
        return Page(render_html(said).encode("utf-8").decode())

    found = page(name)
    assert [tag for tag, _ in found.tags] == [tag for tag, _ in page("plain").tags]
    assert found.of("a")[1]["href"] == f"#{found.data['sites'][0]['id']}"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("pass", "The candidate computes what the reference computes"),
        ("fail", "The candidate goes wrong at the key of layer 0"),
        ("error", "The question could not be answered No site could be compared."),
        ("nan", "The candidate goes wrong at the hidden state of layer 5"),
        ("key-value", "The candidate goes wrong at the key of layer 0"),
        ("outputs", "The candidate goes wrong at the output logits"),
        ("equal", "Candidate and reference are equal to the bit"),
    ],
)
def test_the_first_screen_tells_the_verdict(pages: dict[str, Page], name: str, told: str) -> None:
    page = pages[name]
    verdict = cases.CASES[name].verdict.upper()
    assert told in page.text
    assert verdict in page.text.split(told)[0]


def test_the_first_screen_tells_where_why_and_what_to_do(pages: dict[str, Page]) -> None:
    top = pages["fail"].text.split("Layers one mark")[0]
    assert "The error that it adds is 55 times what rounding in fp16 explains; the limit is 4." in top
    assert "Where layers.0.key The key of layer 0: what a token offers" in top
    assert "It is off by 1.1 % of its size, where rounding in fp16 explains 0.02 %." in top
    assert "29 more sites fail, 59 sites only pass on what came in." in top
    assert cases.CAUSE.title in top
    assert "99.96 % explained" in top
    assert "Putting this fault alone into the reference reproduces 99.96 % of the error." in top
    assert cases.CAUSE.fix in top


def test_nan_is_said_in_words(pages: dict[str, Page]) -> None:
    assert "1024 of its values are NaN or infinite." in pages["nan"].text
    assert "NaN or Inf" in pages["nan"].text


def test_a_failure_without_a_cause_does_not_claim_one(pages: dict[str, Page]) -> None:
    assert "No cause was named" in pages["nan"].text
    assert "explained" not in pages["nan"].text


def test_every_site_is_in_the_table_and_on_the_map(pages: dict[str, Page]) -> None:
    for name, comparison in cases.CASES.items():
        links = [str(a.get("href"))[1:] for a in pages[name].of("a")]
        for site in comparison.sites:
            assert links.count(site.site) >= 2, (name, site.site)
        assert [s["id"] for s in pages[name].data["sites"]] == [s.site for s in comparison.sites]


def test_columns_state_unit_and_direction(pages: dict[str, Page]) -> None:
    titles = " ".join(str(b.get("title")) for b in pages["pass"].of("button"))
    for name in ("mse", "max_abs", "mean_abs", "rel_l2", "row_rel_l2", "introduced"):
        assert f"{METRICS[name].label} (unit: {METRICS[name].unit}); lower is better" in titles
    assert f"{METRICS['cosine'].label} (unit: 1); higher is better" in titles


def test_what_was_not_compared_is_listed(pages: dict[str, Page]) -> None:
    assert "layers.0.key missing in candidate no output of that name map it" in pages["error"].text
    assert "Excluded by name, and not judged output.aux by 'output.aux'" in pages["fail"].text


def test_run_and_command_are_told(pages: dict[str, Page]) -> None:
    assert cases.COMMAND in pages["fail"].text
    assert "reference.versions.torch 2.9.0" in pages["fail"].text
    assert "TF32 was on." in pages["fail"].text


def test_the_contract_is_a_table_with_what_was_ignored(pages: dict[str, Page]) -> None:
    text = pages["fail"].text
    assert "module role layers ran kernels model.rotary_emb rotary Half kgen" in text
    assert f"ignored {cases.IGNORED}" in text
    assert "nodes: 400" in text
    assert "node_299" in text
    assert "node_300" not in text
    assert "and 100 more in report.json" in text


def test_any_contract_is_shown() -> None:
    found = blocks({"a": {"b": [1, 2], "c": {"d": None, "e_f": True}}, "f": [{"x": 1}, {"y": 2.5}], "g": []})
    shown = [(b.title, b.pairs, b.entries, b.columns, b.rows) for b in found]
    assert shown == [
        ("a, b", [], ["1", "2"], (), []),
        ("a, c", [("e f", "yes")], [], (), []),
        ("f", [], [], ("x", "y"), [["1", ""], ["", "2.5"]]),
    ]
    assert flat({"a": {"b": [1, {"c": 2}]}, "d": 1.0}) == [("a.b", "1, c 2"), ("d", "1")]


def test_a_cause_names_its_own_site_and_parameters() -> None:
    gain = Cause("g", "Gain", (), 0.5, "", site="layers.7.value", parameters={"gain": 1.02})
    page = Page(render_html(cases.comparison(cases.site(0, "key", 9.0), causes=(cases.CAUSE, gain))))
    assert "Gain explains 50 % at layers.7.value" in page.text
    assert "gain 1.02" in page.text


def test_what_was_tried_is_told_with_what_speaks_against_it() -> None:
    tried = Hypothesis("layers.0.key", "gain", "A gain", ("K only",), ("no one gain fits",), explained=0.04)
    page = Page(render_html(cases.comparison(cases.site(0, "key", 9.0), diagnosis=(tried,))))
    assert "Explanations that were tried: 1" in page.text
    assert "layers.0.key A gain 4 % K only no one gain fits" in page.text


def test_the_data_of_the_page_has_values_in_full(pages: dict[str, Page]) -> None:
    data = pages["fail"].data
    key = data["sites"][0]
    assert key["values"][:4] == [55.0, 0.011, 0.0002, 0.011]
    assert len(key["token"]) == 64
    assert key["sizes"] == {"token": cases.TOKENS, "head": cases.HEADS}
    assert pages["nan"].data["sites"][-1]["values"][0] is None


def test_a_plot_has_a_place_for_the_pointer_over_every_layer(pages: dict[str, Page]) -> None:
    page = pages["fail"]
    plots = [a for a in page.of("svg") if a.get("class") == "plot"]
    kinds = [(a["data-kind"], a["data-tensor"]) for a in plots]
    assert [k for k in kinds if k[0] == "accumulation"] == [("accumulation", t) for t in cases.ALL]
    assert [k for k in kinds if k[0] == "range"] == [("range", t) for t in cases.ALL]
    assert [k for k in kinds if k[0] == "head"] == [("head", t) for t in cases.KEY_VALUE]
    assert [k for k in kinds if k[0] == "token"] == [("token", t) for t in cases.ALL]
    hits = [a["data-r"] for a in page.of("rect") if a.get("class") == "hit"]
    assert hits == [str(n) for n in range(30)] * (3 + 3 + 2 + 3)


def test_text_in_plots_is_text(pages: dict[str, Page]) -> None:
    assert len(pages["fail"].of("text")) > 100


def test_ids_are_unique(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        ids = [a["id"] for _, a in page.tags if "id" in a]
        assert len(ids) == len(set(ids)), name


def test_pages_are_small() -> None:
    assert len(render_html(cases.fails(32)).encode()) < 1e6
    assert len(render_html(cases.fails(80)).encode()) < 3e6


def test_eighty_layers_with_every_tensor_stay_under_three_megabytes() -> None:
    assert len(render_html(cases.detailed(80)).encode()) < 3e6


def test_eighty_layers_take_less_than_five_seconds() -> None:
    case = cases.fails(80)
    started = time.process_time()
    render_html(case)
    assert time.process_time() - started < 5


def test_the_same_comparison_gives_the_same_page() -> None:
    assert render_html(cases.fails(4)) == render_html(cases.fails(4))


def test_a_page_from_report_json_is_the_page_itself() -> None:
    """NaN becomes null on the way, and is drawn as before."""
    for case in (cases.fails(4), cases.nonfinite(8), cases.evil()):
        page = render_html(Comparison.from_json(case.to_json()))
        assert re.sub(r"\s+", " ", Page(page).text) == re.sub(r"\s+", " ", Page(render_html(case)).text)


@pytest.mark.slow
def test_two_hundred_reports_in_a_session_stay_under_two_hundred_megabytes() -> None:
    """All reports of SmolLM2's 30 layers in a process of their own: its peak, and what 200 would add."""
    script = r"""
import pathlib, re, tempfile
from divergence.reports import write_all
from tests.reports.cases import recorded
with tempfile.TemporaryDirectory() as folder:
    for i in range(25):
        write_all(recorded(), pathlib.Path(folder))
        if i in (4, 24):
            # Not ru_maxrss, which a child has from the process that started it.
            print(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root
    )
    after_5, after_25 = map(int, done.stdout.split())
    assert after_25 + (after_25 - after_5) / 20 * 175 < 200e3
