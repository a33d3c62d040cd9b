"""What the documentation tells people to type is tried here, on the bundled model.

Shell blocks run whole; of commands within the text, those with arguments run and bare names are asked
for their help. What cannot run in a test is listed in `NOT_RUN` with the reason; of commands that need a
device, the options are read. What a page says that a command prints is what it prints.
"""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

import divergence
from divergence import demo
from divergence.reports import write_all

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

NOT_RUN = {
    "make": "sets up an environment or runs these very tests; its target must exist",
    ".ci/run": "runs these very tests; the file must exist",
    "pytest": "runs these very tests; the marker must exist",
    "python": "scripts that need a device or rewrite a page; the script and its options must exist",
}
"""Programs that are not run, and why."""

PLACEHOLDERS = {
    "SRC": "pytorch",
    "FILE": "inputs.npz",
    "DIR": "report",
    "OLD": "report",
    "NEW": "report",
    "CAPTURE": "reference.capture",
}
"""What words that stand for something become."""

NEEDS_DEVICE = ("divergence build ", ".plan")
"""Parts of commands that need TensorRT and a device: their options are read, and nothing runs."""

SCRIPTS = ("benchmarks/**/*.py", "tests/faults/*.py", "divergence/*.py")
"""Where options of other programs than `divergence` are added."""

FAULTY = ("--cand faulty.onnx", "divergence report DIR")
"""Parts of commands that report the planted fault: their exit status is 1."""

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


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model under the names that the pages use, with the README's own configuration; a
    capture of it and one of a candidate, and the reports of the faulty and of the clean candidate."""
    folder = tmp_path_factory.mktemp("ready")
    (folder / "model.py").write_text(MODEL)
    for name in ("model.onnx", "clean.onnx"):
        demo.write_bundled("clean", folder / name)
    demo.write_bundled("rotary-bf16", folder / "faulty.onnx")
    inputs = demo.inputs()
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in inputs.items()}
    np.savez(folder / "inputs.npz", **arrays)
    (configuration,) = blocks((ROOT / "README.md").read_text("utf-8"), "toml")
    wrapper = '\n[sources.wrapper]\nmodel = "model.py:load"\n'
    (folder / "divergence.toml").write_text(configuration + wrapper)
    divergence.capture(demo.load(), inputs, folder / "reference.capture")
    divergence.capture(folder / "model.onnx", inputs, folder / "engine.capture")
    for name, report in (("faulty.onnx", "report"), ("model.onnx", "report-mended")):
        write_all(divergence.compare(demo.load(), folder / name, inputs), folder / report)
    return folder


@pytest.fixture
def project(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `ready`, which is the current folder."""
    folder = tmp_path / "project"
    shutil.copytree(ready, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def run(command: str) -> tuple[int, str]:
    """Runs a command of the documentation in the current folder; its status and what it printed."""
    from click.testing import CliRunner

    from divergence.cli import main

    program, *arguments = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)]
    if program in NOT_RUN:
        return looked_up(program, arguments)
    if program != "divergence":
        return 2, f"neither run nor listed in NOT_RUN: {program}"
    if any(part in command for part in NEEDS_DEVICE) and len(arguments) > 1:
        name, *rest = arguments
        try:
            main.commands[name].make_context(name, rest)
        except click.ClickException as error:
            return 2, error.format_message()
        return 0, ""
    result = CliRunner().invoke(main, [*arguments, "--help"] if len(arguments) == 1 else arguments)
    return result.exit_code, result.output


def looked_up(program: str, arguments: list[str]) -> tuple[int, str]:
    """0 if what a program that is not run would work on exists."""
    if program == "make":
        (target,) = arguments
        known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        return int(target not in known), f"Makefile has the targets {', '.join(known)}"
    if program == "pytest":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
        markers = [m.split(":")[0] for m in project["tool"]["pytest"]["ini_options"]["markers"]]
        flag, marker = arguments
        return int(flag != "-m" or marker not in markers), f"the markers are {', '.join(markers)}"
    script = ROOT / (arguments[0] if program == "python" else program)
    if not script.is_file():
        return 1, f"{script} is missing"
    options = {word for word in arguments if word.startswith("--")}
    return int(not options <= options_of(script)), f"{script.name} has {', '.join(options_of(script))}"


def options_of(script: Path) -> set[str]:
    """Options that a script adds to its parser, or to pytest's, there or by a constant."""
    found = re.findall(
        r"(?:add_?(?:argument|option)\(\s*|_OPTION = )\"(--[a-z-]+)\"", script.read_text("utf-8")
    )
    return set(found)


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_documented_command_works(page: str, command: str, project: Path) -> None:
    status, output = run(command)
    expected = int(any(part in command for part in FAULTY))
    assert status == expected, f"{page}: {command}\n{output}"


@pytest.mark.parametrize("page", ["failing.md", "sites.md"])
def test_a_page_prints_what_its_commands_print(page: str, project: Path) -> None:
    """But for figures, which differ in their last digits from machine to machine."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    printed = "".join(run(command)[1] for command in commands_of(text))
    shown = [line for block in blocks(text, "text") for line in block.splitlines()]
    assert shown
    for line in shown:
        assert without_figures(line) in without_figures(printed), line


def without_figures(text: str) -> str:
    """`text` with a `#` for every number and bar."""
    return re.sub(r"\s+", " ", re.sub(r"[\d.]+(?:e[-+]?\d+)?|[█-▏│]+", "#", text)).strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configurations_are_read(page: Path, tmp_path: Path) -> None:
    for block in blocks(page.read_text("utf-8"), "toml"):
        (tmp_path / "divergence.toml").write_text(block)
        divergence.load_config(tmp_path / "divergence.toml")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{page.name}: {link}"


def test_every_page_is_on_the_map() -> None:
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"]({page.name})" in index, page.name


def test_every_cause_has_its_line() -> None:
    from divergence.diagnosis.causes import CAUSES, TOLD

    page = (ROOT / "docs" / "causes.md").read_text("utf-8")
    named = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(named) == sorted(
        [*(cause.ID for cause in CAUSES), *(cause.ID for cause in TOLD), "unknown"]
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_every_page_is_python(page: Path) -> None:
    for block in blocks(page.read_text("utf-8"), "python"):
        compile(block, page.name, "exec")


def test_the_page_of_the_configuration_is_what_the_code_says() -> None:
    """If not: python docs/render_configuration.py."""
    script = runpy.run_path(str(ROOT / "docs" / "render_configuration.py"))
    assert (ROOT / "docs" / "configuration.md").read_text("utf-8") == script["render"]()


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
        "pytest -m tensorflow",
        "python benchmarks/tensorrt/case_study.py --siz small",
        "divergence build model.onnx --out engine.plan --precison fp16",
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

    known = {flag for c in main.commands.values() for p in c.params for flag in (*p.opts, *p.secondary_opts)}
    for script in (p for folder in SCRIPTS for p in ROOT.glob(folder)):
        known |= options_of(script)
    named = set(re.findall(r"`(--[a-z-]+)", page.read_text("utf-8")))
    assert named <= known | {"--help"}


@pytest.mark.parametrize("page", ["README.md", "docs/metrics.md"])
def test_the_python_of_a_page_runs(page: str, project: Path) -> None:
    """Its tests are called with the names that it takes for given."""
    for block in blocks((ROOT / page).read_text("utf-8"), "python"):
        given: dict[str, Any] = {"load": demo.load, "inputs": demo.inputs(tokens=24)}
        exec(compile(block, page, "exec"), given)  # noqa: S102 - that it runs is what is tested
        for name in [name for name in given if name.startswith("test_")]:
            given[name]()
        assert given["divergence"] is divergence


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 150
