"""What is in examples/ works: the steps and scripts run on the bundled model as a CI system runs them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from divergence.cli import main

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
LINK = "https://example.org/artifacts/7"
EXPRESSIONS = {"steps.page.outputs.artifact-url": LINK}
"""What GitHub puts in the place of `${{ ... }}`."""

WORKFLOW: dict[Any, Any] = yaml.safe_load((EXAMPLES / "github-workflow.yml").read_text("utf-8"))
STEPS: list[dict[str, Any]] = yaml.safe_load((EXAMPLES / "github-step.yml").read_text("utf-8"))

pytestmark = pytest.mark.slow


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A copy of the example."""
    return shutil.copytree(EXAMPLES / "demo", tmp_path / "demo")


def shell(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in `folder` with this environment's programs first on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def run_steps(folder: Path, steps: list[dict[str, Any]]) -> tuple[list[int], str]:
    """Runs the `run` steps as GitHub does: by `bash -e`, after a failure those with `always()` only.

    Returns:
        Their exit statuses, and what they wrote to the summary.
    """
    summary = folder / "step-summary.md"
    summary.touch()
    statuses: list[int] = []
    for step in steps:
        if "run" not in step or "pip install" in step["run"] or (any(statuses) and "if" not in step):
            continue
        assert step.get("if", "always()") == "always()"
        variables = {name: _evaluated(text) for name, text in step.get("env", {}).items()}
        done = shell(folder, "bash", "-e", "-c", step["run"], GITHUB_STEP_SUMMARY=str(summary), **variables)
        statuses.append(done.returncode)
    return statuses, summary.read_text("utf-8")


def _evaluated(text: str) -> str:
    return re.sub(r"\$\{\{\s*(.+?)\s*\}\}", lambda m: EXPRESSIONS[m[1]], text)


def test_the_workflow_is_one() -> None:
    # YAML 1.1 reads the key `on` as true.
    assert WORKFLOW[True] == {"pull_request": None}
    (job,) = WORKFLOW["jobs"].values()
    assert all(("run" in step) != ("uses" in step) for step in job["steps"])
    assert WORKFLOW["permissions"] == {"contents": "read"}


def test_the_workflow_holds_the_steps() -> None:
    assert WORKFLOW["jobs"]["compare"]["steps"][-len(STEPS) :] == STEPS


def test_only_the_comparison_can_be_skipped() -> None:
    """Upload and summary tell of a failure too."""
    compare, upload, summary = STEPS
    assert "if" not in compare and upload["if"] == summary["if"] == "always()"
    assert upload["with"]["path"] == "report" and "--out report" in compare["run"]


def test_every_command_exists() -> None:
    scripts = [step["run"] for step in STEPS if "run" in step]
    scripts.append((EXAMPLES / "ci.sh").read_text("utf-8"))
    named = {found for text in scripts for found in re.findall(r"^\s*divergence (\S+)", text, re.MULTILINE)}
    assert named == {"compare", "report"} and named <= set(main.commands)


def test_the_workflow_passes_a_clean_export(demo: Path) -> None:
    statuses, summary = run_steps(demo, WORKFLOW["jobs"]["compare"]["steps"])
    assert statuses == [0, 0, 0]
    assert "divergence: pass" in summary and f"[Open the report]({LINK})" in summary
    assert (demo / "report" / "report.html").is_file()


def test_the_steps_fail_a_fault_and_tell_of_it(demo: Path) -> None:
    assert shell(demo, "python", "export.py", "rotary-bf16").returncode == 0
    statuses, summary = run_steps(demo, STEPS)
    assert statuses == [1, 0]
    assert "divergence: fail" in summary and "`layers.0.key`" in summary and LINK in summary


def test_the_steps_fail_a_missing_candidate_and_say_that_nothing_was_compared(demo: Path) -> None:
    statuses, summary = run_steps(demo, STEPS)
    assert statuses == [2, 0]
    assert "nothing was compared" in summary


def test_the_script_gives_the_status_and_the_summary(demo: Path) -> None:
    script = str(EXAMPLES / "ci.sh")
    assert shell(demo, "python", "export.py").returncode == 0
    passed = shell(demo, script)
    assert passed.returncode == 0 and "divergence: pass" in passed.stdout
    assert (demo / "report" / "junit.xml").is_file()
    assert shell(demo, "python", "export.py", "rotary-bf16").returncode == 0
    failed = shell(demo, script, "pytorch", "onnx", "report")
    assert failed.returncode == 1 and "divergence: fail" in failed.stdout
    # The report of the run before is not shown for one that could not be made.
    missing = shell(demo, script, "pytorch", "absent.onnx")
    assert missing.returncode == 2 and "divergence: fail" not in missing.stdout
    assert "absent.onnx" in missing.stderr and "nothing was compared" in missing.stderr
