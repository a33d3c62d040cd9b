"""Figures of real engines in the documentation are those of the reports in tests/data/tensorrt/reports."""

from __future__ import annotations

from pathlib import Path

from divergence.result import SiteResult
from tests.reports.recorded import recorded, recorded_chain, recorded_engine_of

DOCS = Path(__file__).parents[1] / "docs"

ENGINES = {
    f"{size}, {words}": f"{size}-{name}"
    for size in ("small", "full")
    for words, name in {
        "fp32": "fp32",
        "fp32 with TF32": "tf32",
        "fp16": "fp16",
        "bf16": "bf16",
        "typed fp16": "typed_fp16",
    }.items()
}
"""Reports by the words of the table in docs/tensorrt.md."""

CHAIN = {
    "ONNX, fp32": recorded_chain().comparisons[0],
    "engine, fp16": recorded_engine_of("smollm2-fp16"),
    "engine, bf16": recorded_engine_of("smollm2-bf16"),
}
"""Comparisons by the words of SmolLM2's table there."""

CAUSES = {
    "small, fp16": "small-fp16",
    "small, bf16": "small-bf16",
    "full, fp16": "full-fp16",
    "full, bf16": "full-bf16",
    "SmolLM2, fp16": "smollm2-fp16",
    "SmolLM2, bf16": "smollm2-bf16",
}
"""Reports by the words of the table in docs/causes.md."""


def table_of(page: str, header: str) -> list[list[str]]:
    """Cells of the rows of the table under `header`; an empty first cell is that of the row above."""
    text = (DOCS / page).read_text("utf-8")
    rows: list[list[str]] = []
    for line in text.split(f"\n{header}")[1].split("\n\n")[0].splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows.append([cells[0] or rows[-1][0], *cells[1:]])
    return rows


def figures_of(site: SiteResult, *, introduced: bool = False) -> str:
    """What a table says of a site, bold if it fails."""
    figures = f"{site.rel_l2:.1e} / {site.floor:.1e} = {site.ratio:.1f}"
    if introduced:
        figures += f" ({site.introduced_ratio:.1f})"
    return f"**{figures}**" if site.verdict == "fail" else figures


def test_the_figures_of_the_case_study_are_those_of_the_reports() -> None:
    """Of the small engines no latency is told: other work ran on the device beside them."""
    rows = table_of("tensorrt.md", "| engine | ms |")
    shown: dict[str, list[int]] = {engine: [] for engine in ENGINES}
    for engine, latency, layer, *cells in rows:
        report = recorded(ENGINES[engine])
        if not shown[engine]:
            measured = f"{report.environment['candidate']['latency_ms']:.2f}"
            assert latency == (measured if engine.startswith("full") else "-"), engine
        else:
            assert not latency, engine
        for tensor, cell in zip(("key", "value", "hidden"), cells, strict=True):
            assert cell == figures_of(report.site(f"layers.{layer}.{tensor}")), (engine, layer, tensor)
        shown[engine].append(int(layer))
    for engine, layers in shown.items():
        assert layers == ([0, 1, 5, 10, 17] if engine.startswith("full") else [0, 1, 5]), engine


def test_the_figures_of_smollm2_are_those_of_its_chains() -> None:
    rows = table_of("tensorrt.md", "| candidate | layer |")
    shown: dict[str, list[str]] = {candidate: [] for candidate in CHAIN}
    for candidate, layer, *cells in rows:
        if layer == "logits":
            sites = [None, None, CHAIN[candidate].site("output.logits")]
        else:
            sites = [CHAIN[candidate].site(f"layers.{layer}.{t}") for t in ("key", "value", "hidden")]
        expected = ["" if site is None else figures_of(site, introduced=True) for site in sites]
        assert cells == expected, (candidate, layer)
        shown[candidate].append(layer)
    assert set(map(tuple, shown.values())) == {("0", "1", "3", "11", "17", "29", "logits")}


def test_the_causes_of_real_engines_are_those_of_the_reports() -> None:
    rows = table_of("causes.md", "| engine | first divergence |")
    for engine, *cells in rows:
        report = recorded_engine_of(CAUSES[engine])
        cause, first, value = report.causes[0], report.first_divergence, report.site("layers.0.value")
        assert first is not None and cause.explained is not None
        error = report.site(first.site).rel_l2
        assert error is not None
        assert cells == [
            f"`{first.site}`, {error:.1e}",
            f"`{cause.id}`",
            ", ".join(cause.parameters["rounded"]),
            f"{cause.explained:.4f}",
            f"{error * (1 - cause.explained) ** 0.5:.2e}",
            f"{value.rel_l2:.2e}",
        ], engine
    assert [engine for engine, *_ in rows] == list(CAUSES)
