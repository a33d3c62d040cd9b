"""The pytest plugin, by running pytest within pytest, in one process and under xdist."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

import divergence
from divergence import demo, pytest_plugin, session
from divergence.config import Config
from divergence.reports import write_all
from divergence.reports.assertion import render_assertion

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]

SUITE = """
import torch, pytest
from divergence import demo

INPUTS = demo.inputs(tokens=12)

def log(text):
    with open({log!r}, "a") as file:
        file.write(text + "\\n")

class Counted(demo.DemoDecoder):
    role = "candidate"
    def forward(self, *args, **kwargs):
        log(self.role)
        return super().forward(*args, **kwargs)

def candidate(fault=None):
    model = Counted().eval()
    with torch.no_grad():
        weight = model.get_submodule("layers.3.self_attn.v_proj").weight
        if fault is not None:
            weight.mul_(fault)
    return model

def reference():
    model = candidate()
    model.role = "reference"
    return model
"""


def _plugin() -> list[str]:
    """Nothing where the plugin is installed with its entry point, which may not be loaded twice."""
    installed = any(e.value == "divergence.pytest_plugin" for e in entry_points(group="pytest11"))
    return [] if installed else ["-p", "divergence.pytest_plugin"]


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Loads all that a comparison loads: the inner run forgets the modules that it was first to load."""
    model = demo.load()
    with demo.planted(model, value_gain={3: 1.02}):
        result = divergence.compare(demo.load(), model, demo.inputs(tokens=12), config=Config())
    assert render_assertion(result)
    write_all(result, tmp_path_factory.mktemp("warm"))


@pytest.fixture
def suite(pytester: pytest.Pytester, warm: None) -> pytest.Pytester:
    """A folder with a module `suite` of models for its tests."""
    pytester.syspathinsert()
    pytester.makepyfile(suite=SUITE.format(log=str(pytester.path / "log.txt")))
    return pytester


def forwards(suite: pytest.Pytester) -> dict[str, int]:
    """How often models of each role ran."""
    words = (suite.path / "log.txt").read_text().split()
    return {role: words.count(role) for role in set(words)}


def run(suite: pytest.Pytester, *args: str) -> pytest.RunResult:
    """Runs the suite within this process."""
    return suite.runpytest_inprocess(*_plugin(), "-p", "no:cacheprovider", *args)


def message(result: pytest.RunResult) -> list[str]:
    """The lines of the first failure's message."""
    return [line[4:].strip() for line in result.outlines if line.startswith("E   ")]


def index(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "index.json").read_text())
    return content


def test_the_fixture_and_assert_close_pass(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        test_close="""
        import divergence as package
        from suite import *
        def test_fixture(divergence):
            assert divergence(reference(), candidate(), INPUTS).verdict == "pass"
        def test_plain():
            package.assert_close(reference(), candidate(), INPUTS)
        """
    )
    run(suite).assert_outcomes(passed=2)


def test_a_failure_says_where_how_much_and_why_in_three_lines(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        test_fail="""
        from suite import *
        def test_scaled(divergence):
            divergence(reference(), candidate(1.02), INPUTS)
        """
    )
    result = run(suite)
    result.assert_outcomes(failed=1)
    first, second, third = message(result)[:3]
    assert first == "AssertionError: layers.3.value fails: layer 3, tensor value"
    assert re.fullmatch(
        r"introduces an error of 2\.0e-2, [\d.e+]+x its own noise floor (of [\d.e-]+|at the median .+)"
        r" \(limit 4x\)",
        second,
    )
    assert third.startswith("cause: 'self_attn.v_proj.weight' is 1.02 times the reference's (explains ")
    assert "; fix: compare 'self_attn.v_proj.weight'" in third
    # The traceback ends where the test asserts.
    assert not any("assertions.py" in line for line in result.outlines)


def test_nan_fails_and_is_named(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        test_nan="""
        from suite import *
        def test_nan(divergence):
            divergence(reference(), candidate(float("nan")), INPUTS)
        """
    )
    result = run(suite, "--divergence-report", "reports")
    result.assert_outcomes(failed=1)
    assert message(result)[0] == "AssertionError: layers.3.value fails: layer 3, tensor value"
    assert "NaN or Inf" in message(result)[1]
    (entry,) = index(suite.path / "reports")["comparisons"]
    assert entry["verdict"] == "fail" and "NaN or Inf" in entry["figure"]


def test_what_cannot_be_answered_fails_the_test_and_is_listed(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        test_error="""
        from suite import *
        def test_error(divergence):
            divergence(reference(), "missing.onnx", INPUTS)
        def test_name(divergence):
            divergence(reference(), candidate(), {"input_id": INPUTS["input_ids"]})
        """
    )
    result = run(suite, "--divergence-report", "reports")
    result.assert_outcomes(failed=2)
    content = index(suite.path / "reports")
    assert content["verdict"] == "error" and content["counts"] == {"pass": 0, "fail": 0, "error": 2}
    assert "missing.onnx" in content["comparisons"][0]["reason"]
    assert "input_id" in content["comparisons"][1]["reason"]


THRESHOLDS = """
import divergence as package
import pytest
from suite import *

@pytest.mark.divergence("layers.3.*:rel_l2=0.1", "layers.*:rel_l2=0.1", "output.*:rel_l2=0.1")
def test_loose_marker():
    package.assert_close(reference(), candidate(1.02), INPUTS)

@pytest.mark.divergence(tolerance={"layers.3.value": {"rel_l2": 1e-9}})
def test_strict_marker(divergence):
    divergence(reference(), candidate(1 + 2**-22), INPUTS)

def test_loose_argument(divergence):
    divergence(reference(), candidate(1.02), INPUTS, tolerance="rel_l2=0.1")

def test_strict_argument(divergence):
    divergence(reference(), candidate(1 + 2**-22), INPUTS, tolerance={"layers.3.value": {"rel_l2": 1e-9}})

@pytest.mark.divergence("rel_l2=1e-9")
class TestNearest:
    @pytest.mark.divergence("rel_l2=0.1")
    def test_marker_of_the_test_beats_that_of_the_class(self, divergence):
        divergence(reference(), candidate(1.02), INPUTS)
    def test_argument_beats_marker(self, divergence):
        divergence(reference(), candidate(1.02), INPUTS, tolerance="rel_l2=0.1")

@pytest.mark.divergence(exclude=["layers.*", "output.keys", "output.logits"])
def test_options(divergence):
    assert [s.site for s in divergence(reference(), candidate(), INPUTS).sites] == ["output.values"]
"""


def test_thresholds_of_markers_and_arguments(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_thresholds=THRESHOLDS)
    result = run(suite, "-rA")
    failed = set(re.findall(r"^FAILED \S+::(\w+)", result.stdout.str(), re.MULTILINE))
    assert failed == {"test_strict_marker", "test_strict_argument"}
    assert "is above the limit 1e-9" in result.stdout.str()


def test_thresholds_of_the_configuration_of_the_root(suite: pytest.Pytester) -> None:
    suite.makepyprojecttoml('[tool.divergence.tolerance.sites."layers.3.value"]\nrel_l2 = 1e-9\n')
    suite.makepyfile(
        test_config="""
        from suite import *
        def test_strict(divergence):
            divergence(reference(), candidate(1 + 2**-22), INPUTS)
        def test_replaced(divergence):
            loose = {"layers.3.value": {"rel_l2": 1}}
            divergence(reference(), candidate(1 + 2**-22), INPUTS, tolerance=loose)
        """
    )
    result = run(suite)
    result.assert_outcomes(failed=1, passed=1)
    assert "rel_l2" in message(result)[1]


@pytest.mark.parametrize(
    ("marker", "said"),
    [
        ("precison='fp16'", "@pytest.mark.divergence: has no option 'precison'; did you mean 'precision'?"),
        ("'layers.*.key:cosin=1'", "'cosin' is not a metric; did you mean 'cosine'?"),
        ("7", "a tolerance is a text such as"),
        ("{'layers.*': 0.1}", "give limits by metric"),
        ("{'layers.*': {'mse': 'small'}}", "must be a number"),
        ("exclude=''", "exclude: '' is no pattern of sites"),
    ],
)
def test_a_marker_that_makes_no_sense_is_one_line(suite: pytest.Pytester, marker: str, said: str) -> None:
    suite.makepyfile(
        test_marker=f"""
        import pytest
        from suite import *
        @pytest.mark.divergence({marker})
        def test_it(divergence):
            divergence(reference(), candidate(), INPUTS)
        """
    )
    result = run(suite, "--divergence-report", "reports")
    result.assert_outcomes(failed=1)
    assert len(message(result)) == 1 and said in message(result)[0]
    (entry,) = index(suite.path / "reports")["comparisons"]
    assert entry["verdict"] == "error" and said in entry["reason"]


REPORTED = """
import divergence as package
import pytest
from suite import *

NAMES = ["a/b", "a_b", "<img src=x onerror=alert(1)>", "..", "\\u00e4 \\u2603", "x" * 300]

@pytest.mark.parametrize("name", NAMES)
def test_named(divergence, name):
    divergence(reference(), candidate(), INPUTS)

def test_twice():
    package.assert_close(reference(), candidate(), INPUTS)
    package.assert_close(reference(), candidate(1.02), INPUTS)

def test_nothing():
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [[], ["-p", "xdist", "-n", "2"]], ids=["one process", "two workers"])
def test_the_report_lists_every_comparison(suite: pytest.Pytester, workers: list[str]) -> None:
    suite.makepyfile(test_reported=REPORTED)
    result = run(suite, *workers, "--divergence-report", "reports")
    result.assert_outcomes(passed=7, failed=1)
    out = suite.path / "reports"
    result.stdout.fnmatch_lines(["8 comparisons: 7 pass, 1 fail; index: *index.html"])
    content = index(out)
    assert content["verdict"] == "fail" and content["counts"] == {"pass": 7, "fail": 1, "error": 0}
    entries = content["comparisons"]
    assert (entries[0]["test"], entries[0]["number"]) == ("test_reported.py::test_twice", 2)
    assert entries[0]["site"] == "layers.3.value" and entries[0]["layer"] == 3
    folders = [e["folder"] for e in entries]
    assert len(set(folders)) == 8
    assert sorted(p.name for p in out.iterdir()) == sorted([*folders, "index.html", "index.json"])
    page = (out / "index.html").read_text()
    assert "<img" not in page and "<script" not in page
    for entry in entries:
        report = json.loads((out / entry["folder"] / "report.json").read_text())
        assert report["verdict"] == entry["verdict"]
        assert entry["test"] in report["command"]
        assert f'href="{entry["folder"]}/report.html"' in page and html.escape(entry["test"]) in page
    assert "report: " in result.stdout.str()


@pytest.mark.parametrize(
    "workers", [[], ["-p", "xdist", "-n", "2", "--dist", "loadfile"]], ids=["one", "xdist"]
)
def test_the_reference_runs_once(suite: pytest.Pytester, workers: list[str]) -> None:
    """For all tests of a process, although each loads it anew; other inputs are another run."""
    suite.makepyfile(
        test_once="""
        from suite import *
        import pytest
        @pytest.mark.parametrize("n", range(3))
        def test_it(divergence, n):
            divergence(reference(), candidate(), INPUTS)
        def test_others(divergence):
            divergence(reference(), candidate(), demo.inputs(tokens=5))
        """
    )
    run(suite, *workers).assert_outcomes(passed=4)
    assert forwards(suite) == {"reference": 2, "candidate": 4}


@pytest.mark.slow
def test_a_worker_that_dies_loses_no_comparison_before(suite: pytest.Pytester) -> None:
    suite.makepyfile(
        test_dies="""
        import os
        from suite import *
        def test_first(divergence):
            divergence(reference(), candidate(), INPUTS)
        def test_second(divergence):
            divergence(reference(), candidate(), INPUTS)
            os._exit(3)
        """
    )
    workers = ["-p", "xdist", "-n", "1", "--max-worker-restart", "0"]
    result = run(suite, *workers, "--divergence-report", "reports")
    result.assert_outcomes(passed=1, failed=1)
    tests = [e["test"] for e in index(suite.path / "reports")["comparisons"]]
    assert tests == ["test_dies.py::test_first", "test_dies.py::test_second"]


def test_a_line_that_was_cut_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "gw0.jsonl").write_text('{"test": "a"}\n{"tes')
    (tmp_path / "gw1.jsonl").write_text('{"test": "b"}\n')
    assert pytest_plugin._entries(tmp_path) == [{"test": "a"}, {"test": "b"}]


def test_the_page_of_documentation_runs(pytester: pytest.Pytester, warm: None) -> None:
    """Every block of Python in docs/pytest.md is a test file beside those of examples/demo."""
    shutil.copytree(ROOT / "examples" / "demo", pytester.path, dirs_exist_ok=True)
    demo.write_bundled("clean", pytester.path / "model.onnx")
    page = (ROOT / "docs" / "pytest.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    for i, block in enumerate(blocks):
        (pytester.path / f"test_block_{i}.py").write_text(block)
    pytester.syspathinsert()
    result = run(pytester, "--strict-markers")
    # One test of the example, one of each block, and another of the last.
    result.assert_outcomes(passed=len(blocks) + 2)


def test_a_folder_that_cannot_be_made_is_one_line(suite: pytest.Pytester) -> None:
    (suite.path / "file").write_text("")
    result = run(suite, "--divergence-report", "file/reports")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert any("--divergence-report" in line and "cannot be made" in line for line in result.errlines)


def test_a_session_without_comparisons_is_no_pass(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_none="def test_it(): pass")
    run(suite, "--divergence-report", "reports").assert_outcomes(passed=1)
    assert index(suite.path / "reports")["verdict"] == "error"
    assert "Nothing was compared" in (suite.path / "reports" / "index.html").read_text()


def test_the_plugin_loads_no_framework_and_in_no_time() -> None:
    """It is loaded for every suite; its own share is measured once pytest is there."""
    code = (
        "import sys, time, pytest\n"
        "before = time.perf_counter()\n"
        "import divergence.pytest_plugin\n"
        "took = time.perf_counter() - before\n"
        "heavy = {'torch', 'numpy', 'onnx', 'numba', 'pandas', 'matplotlib', 'rich', 'jinja2'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "print(took)"
    )
    # The best of three: another process may have the machine.
    took = [
        float(subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True).stdout)
        for _ in range(3)
    ]
    assert min(took) < 0.1


def test_sessions_nest() -> None:
    outer, inner = session.Session(ROOT), session.Session(ROOT)
    before = session.current()
    session.begin(outer)
    session.begin(inner)
    assert session.current() is inner
    session.end(inner)
    assert session.current() is outer
    session.end(outer)
    assert session.current() is before


def test_folder_names_are_safe_and_tell_tests_apart() -> None:
    names = ["a.py::t[x/y]", "a.py::t[x_y]", "../../etc", "", ".", "A.py::t", "a.py::t", "\udc80", "z" * 999]
    folders = [session.folder_name(name) for name in names]
    assert len({folder.casefold() for folder in folders}) == len(names)
    assert all(re.fullmatch(r"[\w.-]{9,100}", f, re.ASCII) and f[0] != "." for f in folders)
