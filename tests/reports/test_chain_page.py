"""The page of a chain."""

from __future__ import annotations

import dataclasses
import html
import re
from pathlib import Path

import pytest

from divergence.chain_result import Chain
from divergence.reports import write_all
from divergence.reports.html import render_chain_html
from tests.reports.recorded import recorded_chain

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def chain() -> Chain:
    return recorded_chain()


def test_all_candidates_stand_in_its_tables_and_plots(chain: Chain) -> None:
    page = render_chain_html(chain)
    assert page.count('class="plot"') == 3
    for name, comparison in zip(chain.names, chain.comparisons, strict=True):
        assert f"<code>{name}</code>" in page
        first = comparison.first_divergence
        assert first is None or f"report.html#{first.site}" in page
    assert "report.html#layers.0.key" in page
    for step in chain.steps:
        assert f"{step.from_} → {step.to}" in page
    assert ">1.87<" in page, "the engine's latency beside its accuracy"


def test_it_needs_nothing_and_allows_nothing(chain: Chain) -> None:
    page = render_chain_html(chain)
    assert "default-src 'none'" in html.unescape(page)
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=[\"'](?:https?:)?//", page)
    assert not re.search(r"<[a-z]+ [^>]*style=", page), "the policy forbids styles in attributes"


def test_names_stay_text(chain: Chain) -> None:
    names = (EVIL, *chain.names[1:])
    step = dataclasses.replace(chain.steps[0], to=EVIL, sentence=EVIL)
    page = render_chain_html(
        dataclasses.replace(chain, names=names, steps=(step,), reason=EVIL, command=EVIL)
    )
    assert "<img" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page


def test_a_candidate_that_could_not_run_has_a_row_and_no_line(chain: Chain) -> None:
    broken = dataclasses.replace(
        chain.comparisons[0], verdict="error", reason="no such file", sites=(), first_divergence=None
    )
    page = render_chain_html(dataclasses.replace(chain, comparisons=(broken, chain.comparisons[1])))
    assert "no such file" in page
    assert f"<b>{chain.names[0]}</b>" not in page
    assert f"<b>{chain.names[1]}</b>" in page


def test_a_chain_of_which_nothing_ran_has_a_page(chain: Chain) -> None:
    broken = dataclasses.replace(
        chain.comparisons[0], verdict="error", reason="no such file", sites=(), first_divergence=None
    )
    page = render_chain_html(dataclasses.replace(chain, comparisons=(broken, broken)))
    assert 'class="plot"' not in page


def test_the_pages_it_links_to_are_written(chain: Chain, tmp_path: Path) -> None:
    pages = write_all(chain, tmp_path)
    assert pages[0] == tmp_path / "report.html"
    linked = set(re.findall(r'href="([^"#]+)', pages[0].read_text("utf-8"))) - {"data:,"}
    assert {tmp_path / link for link in linked} == set(pages[1:])
