"""What the documentation tells people to type is tried here, on the bundled model.

Shell blocks run whole; of commands within the text, those with arguments run and bare names are asked
for their help. What cannot run in a test is listed in `NOT_RUN` with the reason.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import divergence
from divergence import demo

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

NOT_RUN = {
    "make": "sets up an environment or runs these very tests; its target must exist",
    ".ci/run": "runs these very tests; the file must exist",
}
"""Programs that are not run, and why."""

PLACEHOLDERS = {"SRC": "pytorch", "FILE": "inputs.npz", "DIR": "report"}
"""What words that stand for something become."""

PYTEST_OPTION = "--divergence-report"
"""An option of pytest's; `tests/test_pytest_plugin.py` tries it."""

MODEL = "from divergence.demo import load\n"


def blocks(text: str, *languages: str) -> list[str]:
    """Contents of the fenced blocks in one of `languages`."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for language, content in found if language in languages]


def commands_of(text: str) -> list[str]:
    """Commands in shell blocks, in indented lines and within the text, without comments and prompts."""
    found: list[str] = []
    for block in blocks(text, "sh", "shell", "bash", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                found.append(shlex.join(words))
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    found += re.findall(r"^    (make [a-z-]+|\.ci/run)\b", plain, re.MULTILINE)
    found += re.findall(r"`((?:divergence|make) [^`]+)`", plain)
    return list(dict.fromkeys(found))


COMMANDS = [(page.name, command) for page in PAGES for command in commands_of(page.read_text("utf-8"))]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundled model under the names that the README uses, with the README's own configuration."""
    (tmp_path / "model.py").write_text(MODEL)
    demo.write_bundled("clean", tmp_path / "model.onnx")
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in demo.inputs(tokens=24).items()}
    np.savez(tmp_path / "inputs.npz", **arrays)
    (configuration,) = blocks((ROOT / "README.md").read_text("utf-8"), "toml")
    (tmp_path / "divergence.toml").write_text(configuration)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run(command: str) -> tuple[int, str]:
    """Runs a command of the documentation in the current folder; its status and what it printed."""
    from click.testing import CliRunner

    from divergence.cli import main

    program, *arguments = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)]
    if program == "make":
        (target,) = arguments
        known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        return int(target not in known), f"Makefile has the targets {', '.join(known)}"
    if program in NOT_RUN:
        return int(not (ROOT / program).is_file()), f"{program} is missing"
    if program != "divergence":
        return 2, f"neither run nor listed in NOT_RUN: {program}"
    result = CliRunner().invoke(main, [*arguments, "--help"] if len(arguments) == 1 else arguments)
    return result.exit_code, result.output


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_documented_command_works(page: str, command: str, project: Path) -> None:
    status, output = run(command)
    assert status == 0, f"{page}: {command}\n{output}"


def test_documented_files_are_written(project: Path) -> None:
    """By the first command of the README, whose `--out` holds what the README says."""
    first = next(command for _, command in COMMANDS if "--out report" in command)
    assert run(first)[0] == 0
    assert (project / "report" / "report.json").is_file()


@pytest.mark.parametrize(
    "command",
    [
        "divergence compere",
        "divergence compare --ref pytorch --candidate model.onnx",
        "divergence inspect SRC --colour",
        "make dema",
        ".ci/walk",
        "python3 docs/gone.py",
    ],
)
def test_a_command_that_does_not_exist_fails(command: str, project: Path) -> None:
    assert run(command)[0] != 0


def test_commands_are_found_in_blocks_lines_and_text() -> None:
    """Else the test above would try nothing."""
    text = (
        "```sh\n$ make demo   # sets up\n\ndivergence compare \\\n  --ref 'a b'\n```\n"
        "    make lint        ruff\n\nuse `divergence inspect SRC`, not `divergence.toml`\n"
        "```python\nmake = 1\n```\n"
    )
    assert commands_of(text) == [
        "make demo",
        "divergence compare --ref 'a b'",
        "make lint",
        "divergence inspect SRC",
    ]
    assert {"README.md", "CONTRIBUTING.md"} <= {page for page, _ in COMMANDS}
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_flags_exist(page: Path) -> None:
    from divergence.cli import main

    known = {flag for command in main.commands.values() for p in command.params for flag in p.opts}
    named = set(re.findall(r"`(--[a-z-]+)", page.read_text("utf-8")))
    assert named <= known | {"--help", PYTEST_OPTION}


def test_the_python_of_the_readme_runs(project: Path) -> None:
    """Its tests are called with the names that it takes for given."""
    for block in blocks((ROOT / "README.md").read_text("utf-8"), "python"):
        given: dict[str, Any] = {"load": demo.load, "inputs": demo.inputs(tokens=24)}
        exec(compile(block, "README.md", "exec"), given)  # noqa: S102 - that it runs is what is tested
        tests = [value for name, value in given.items() if name.startswith("test_")]
        assert tests
        for test in tests:
            test()
    assert given["divergence"] is divergence
