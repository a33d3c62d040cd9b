"""`--out`, `divergence report` and `divergence diff`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from divergence.chain_result import Chain, Step, load_any
from divergence.cli import main
from divergence.pairs_result import PairResult, Pairs
from divergence.reports import write_all
from divergence.result import Comparison, load_report
from tests.reports import cases

FILES = ["junit.xml", "plots", "report.html", "report.json", "summary.md"]


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def saved(case: Comparison, folder: Path) -> Path:
    case.save(folder / "report.json")
    return folder


def test_all_reports_are_written(tmp_path: Path) -> None:
    write_all(cases.fails(3), tmp_path / "new" / "out", link="https://a.b/c")
    assert sorted(p.name for p in (tmp_path / "new" / "out").iterdir()) == FILES
    assert "(https://a.b/c)" in (tmp_path / "new" / "out" / "summary.md").read_text(encoding="utf-8")
    assert load_report(tmp_path / "new" / "out") == Comparison.from_json(cases.fails(3).to_json())


@pytest.mark.parametrize(("name", "status"), [("pass", 0), ("fail", 1), ("error", 2)])
def test_report_renders_again_from_the_json_alone(name: str, status: int, tmp_path: Path) -> None:
    whole, again = tmp_path / "whole", saved(cases.CASES[name], tmp_path / "again")
    write_all(cases.CASES[name], whole)
    result = run("report", again)
    assert result.exit_code == status
    assert result.output.splitlines()[-1] == f"report: {again / 'report.html'}"
    for file in whole.rglob("*"):
        if file.is_file():
            assert (again / file.relative_to(whole)).read_bytes() == file.read_bytes(), file


def test_report_takes_the_address_of_the_page(tmp_path: Path) -> None:
    run("report", saved(cases.passes(1), tmp_path), "--link", "https://a.b/c")
    assert "[Open the report](https://a.b/c)" in (tmp_path / "summary.md").read_text(encoding="utf-8")


def test_a_folder_without_a_report_is_one_line(tmp_path: Path) -> None:
    result = run("report", tmp_path)
    assert result.exit_code == 2
    assert result.output.splitlines() == [
        f"error: {tmp_path / 'report.json'}: no such report; give the folder that compare --out wrote"
    ]


@pytest.mark.parametrize(("schema", "mend"), [(0, "run compare again"), (2, "update divergence")])
def test_another_schema_is_refused_by_name(schema: int, mend: str, tmp_path: Path) -> None:
    content = json.loads(cases.passes(1).to_json())
    (tmp_path / "report.json").write_text(json.dumps({**content, "schema": schema}), encoding="utf-8")
    result = run("report", tmp_path)
    assert result.exit_code == 2
    assert f"report schema {schema}, this version reads 1; {mend}" in result.output
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"schema": 1}', b"\xff\xfe", b"null"])
def test_what_is_no_report_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(content)
    result = run("report", tmp_path)
    assert result.exit_code == 2
    assert "not a report of divergence" in result.output
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize(
    "fault",
    [
        {"verdict": "maybe"},
        {"sites": [3]},
        {"sites": [{"site": "layers.0.key"}]},
        {"policy": None},
        {"policy": {"policy": "noise-floor"}},
        {"unmatched": [{}]},
        {"causes": 7},
    ],
)
def test_a_report_that_was_tampered_with_is_one_line(fault: dict[str, object], tmp_path: Path) -> None:
    content = json.loads(cases.fails(1).to_json())
    (tmp_path / "report.json").write_text(json.dumps({**content, **fault}), encoding="utf-8")
    result = run("report", tmp_path)
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert str(tmp_path) in result.output
    assert "run compare again" in result.output or "not a report of divergence" in result.output
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize("fault", [{"rel_l2": "much"}, {"profile": None}, {"layer": "third"}, {"shape": 3}])
def test_a_site_that_was_tampered_with_is_one_line(fault: dict[str, object], tmp_path: Path) -> None:
    content = json.loads(cases.fails(1).to_json())
    content["sites"][0].update(fault)
    (tmp_path / "report.json").write_text(json.dumps(content), encoding="utf-8")
    result = run("report", tmp_path)
    assert result.exit_code == 2
    assert "run compare again" in result.output
    assert len(result.output.splitlines()) == 1


def test_diff_gates(tmp_path: Path) -> None:
    good, bad = saved(cases.passes(), tmp_path / "good"), saved(cases.fails(), tmp_path / "bad")
    result = run("diff", good, bad)
    assert (result.exit_code, result.output.split()[0]) == (1, "REGRESSED")
    result = run("diff", bad, good / "report.json")
    assert (result.exit_code, result.output.split()[0]) == (0, "IMPROVED")
    result = run("diff", good, good)
    assert (result.exit_code, result.output.split()[0]) == (0, "UNCHANGED")
    assert run("diff", good, saved(cases.error(), tmp_path / "error")).exit_code == 2
    assert run("diff", good, good, "--factor", 1).exit_code == 2
    assert run("diff", good, tmp_path / "none").exit_code == 2


def chain() -> Chain:
    first, second = cases.passes(2), cases.fails(2)
    steps = (
        Step("pytorch", "onnx", "pass", "changes nothing"),
        Step("onnx", "../engine", "fail", "breaks the key"),
    )
    return Chain("fail", "the engine", "pytorch", ("onnx", "../engine"), steps, (first, second), command="x")


def test_of_a_chain_every_candidate_has_its_reports(tmp_path: Path) -> None:
    """In a folder of its own, whatever it is called."""
    pages = write_all(chain(), tmp_path / "out")
    assert pages == [tmp_path / "out" / name / "report.html" for name in (".", "1-onnx", "2-.._engine")]
    found = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert found == ["1-onnx", "2-.._engine", "report.html", "report.json"]
    assert sorted(p.name for p in pages[1].parent.iterdir()) == FILES
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_chain_is_rendered_again(tmp_path: Path) -> None:
    chain().save(tmp_path / "report.json")
    result = run("report", tmp_path)
    assert result.exit_code == 1
    pages = [f"report: {tmp_path / name / 'report.html'}" for name in ("1-onnx", "2-.._engine")]
    assert result.output.splitlines()[-2:] == pages
    assert load_any(tmp_path) == Chain.from_json(chain().to_json())
    assert run("diff", tmp_path, tmp_path).output.startswith("error: ")
    assert run("diff", tmp_path / "1-onnx", tmp_path / "2-.._engine").exit_code == 1


@pytest.mark.parametrize(("columns", "widest"), [("40", 60), ("80", 80), ("300", 100)])
def test_what_is_printed_is_as_wide_as_the_terminal(
    columns: str, widest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    shown = run("report", saved(cases.fails(3), tmp_path)).output.splitlines()[:-1]
    assert widest - 20 < max(map(len, shown)) <= widest


@pytest.mark.parametrize("command", [["explain"], ["diff"]])
def test_a_folder_of_several_reports_names_one_of_them(command: list[str], tmp_path: Path) -> None:
    each = [PairResult(name, "a", cases.passes(2), f"{i}-{name}-a") for i, name in enumerate("xy", 1)]
    write_all(Pairs.of(each, "pytorch", {}), tmp_path / "pairs")
    write_all(chain(), tmp_path / "chain")
    for folder, said in (
        ("pairs", "index.json: the index of several reports; name one of them, such as 1-x-a beside it"),
        ("chain", "report.json: the report of a chain; name that of one of its candidates, such as 1-onnx"),
    ):
        result = run(*command, *[tmp_path / folder] * (2 if command == ["diff"] else 1))
        assert result.exit_code == 2
        assert said in result.output and len(result.output.splitlines()) == 1
    assert run("explain", tmp_path / "pairs" / "1-x-a").exit_code == 0
