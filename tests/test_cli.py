"""The command line: verdicts as exit statuses, and one line for everything that goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from divergence.captures import open_capture
from divergence.pipeline import record
from divergence.probes import silent
from divergence.probes.pytorch import PyTorchProbe
from tests import model_file
from tests.models import inputs_for, llama

MODEL = f"""{model_file.MODEL}
def text():
    return "model"

def needs(x):
    return x

def flat():
    return torch.nn.Linear(2, 2)

def broken(
"""
ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project: a model file, inputs, and a configuration."""
    (tmp_path / "model.py").write_text(MODEL.split("def broken", maxsplit=1)[0])
    (tmp_path / "broken.py").write_text(MODEL)
    arrays: dict[str, Any] = {n: t.numpy() for n, t in inputs_for("llama").items()}
    np.savez(tmp_path / "inputs.npz", **arrays)
    (tmp_path / "divergence.toml").write_text(
        'inputs = "inputs.npz"\n[sources.pytorch]\nmodel = "model.py:load"\n'
        '[sources.wrong]\nmodel = "model.py:faulty"\n'
    )
    return tmp_path


def divergence(folder: Path, *args: str) -> tuple[int, str, str]:
    """Runs the command line in this process; status, stdout, stderr."""
    from click.testing import CliRunner

    from divergence.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(ROOT))
        result = CliRunner().invoke(main, args)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def refused(folder: Path, *args: str) -> str:
    """The one line that a refused command prints."""
    status, _, err = divergence(folder, *args)
    assert status == 2
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_the_whole_command_passes_and_writes_its_report(folder: Path) -> None:
    status, out, err = divergence(
        folder, "compare", "--ref", "pytorch", "--cand", "pytorch", "--out", "report"
    )
    assert status == 0 and "error" not in err
    assert "PASS" in out and "equal to the bit" in out
    assert json.loads((folder / "report/report.json").read_text())["verdict"] == "pass"
    assert "\x1b" not in out


def test_a_fault_is_exit_status_1(folder: Path) -> None:
    status, out, _ = divergence(folder, "compare", "--ref", "pytorch", "--cand", "wrong", "--out", "report")
    assert status == 1
    assert "FAIL" in out and "layers.1.value" in out
    report = json.loads((folder / "report/report.json").read_text())
    assert report["first_divergence"] == {
        "site": "layers.1.value",
        "stack": "",
        "layer": 1,
        "tensor": "value",
    }
    assert report["schema"] == 1


def test_captures_are_made_and_compared(folder: Path) -> None:
    assert divergence(folder, "capture", "wrong", "--out", "run.capture")[0] == 0
    assert len(open_capture(folder / "run.capture").sites) == 10
    assert divergence(folder, "compare", "--ref", "pytorch", "--cand", "run.capture")[0] == 1


def test_inspect_lists_the_sites(folder: Path) -> None:
    status, out, _ = divergence(folder, "inspect", "pytorch")
    assert status == 0
    assert "layers.2.key" in out and "cache" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--cand", "missing.onnx"], "missing.onnx"),
        (["--cand", ""], "a source is empty"),
        (["--cand", "."], ".: not a capture"),
        (["--cand", "/"], "/: not a capture"),
        (
            ["--cand", "wrnog"],
            "no such file, and no source of that name in the configuration; did you mean 'wrong'?",
        ),
        (["--cand", "pytorch:model.py:raises"], "raised ValueError: no weights here"),
        (["--cand", "pytorch:model.py:text"], "returned str, not a torch.nn.Module"),
        (["--cand", "pytorch:model.py:flat"], "has no layer stack"),
        (["--cand", "pytorch:model.py:laod"], "'load'"),
        (["--cand", "pytorch:absent.py:load"], "absent.py: no such file"),
        (["--cand", "pytorch:broken.py:load"], "SyntaxError"),
        (["--cand", "pytorch:model.py:needs"], "argument: 'x', when called without arguments, in model.py"),
        (["--cand", "wrong", "--inputs", "model.py:needs"], "when called without arguments, in model.py"),
        (["--cand", "pytorch", "--host", "both"], "--host is for engines, and pytorch is none; leave it out"),
        (
            ["--cand", "a.onnx", "--cand", "pytorch", "--hazards"],
            "--hazards is for engines, and a.onnx, pytorch",
        ),
        (["--cand", "pytorch", "--plugin", "nope.so"], "--plugin is for engines"),
        (["--cand", "engine.plan", "--hazards"], "engine.plan: no such file; build it"),
        (["--cand", "model.py"], "model.py"),
        (["--cand", "engine.plan"], "engine.plan: no such file; build it"),
        (["--cand", "pytorch", "--precision", "fp61"], "precision 'fp61' is unknown"),
        (["--cand", "pytorch", "--precision", ""], "precision '' is unknown"),
        (["--cand", "pytorch", "--exclude", ""], "exclude: '' is no pattern"),
        (["--cand", "pytorch", "--inputs", "none.npz"], "none.npz"),
        (["--cand", "pytorch", "--tolerance", "cosin=1"], "cosin"),
        (["--cand", "pytorch", "--keep-captures"], "--keep-captures needs --out"),
        (["--cand", "pytorch", "--config", "absent.toml"], "absent.toml"),
        ([], "Missing option '--cand'"),
    ],
)
def test_bad_input_is_one_line(folder: Path, args: list[str], message: str) -> None:
    assert message in refused(folder, "compare", "--ref", "pytorch", *args)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"tokens": np.zeros((1, 4), np.int64)}, "raised"),
        ({"input_ids": np.zeros((1, 4), np.float32)}, "input_ids float32[1, 4]"),
        ({"input_ids": np.zeros((4,), np.int64)}, "input_ids int64[4]"),
        ({"input_ids": np.full((1, 4), 5000)}, "raised IndexError"),
    ],
)
def test_inputs_that_do_not_fit_are_one_line(folder: Path, inputs: dict[str, Any], message: str) -> None:
    np.savez(folder / "bad.npz", **inputs)
    assert message in refused(folder, "compare", "--ref", "pytorch", "--cand", "wrong", "--inputs", "bad.npz")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["compare", "--ref", "", "--cand", "pytorch"], "a source is empty"),
        (["inspect", "."], ".: not a capture"),
        (["capture", ".", "--out", "run.capture"], ".: not a capture"),
        (["capture", "pytorch", "--out", "."], ".: a capture is a folder of its own"),
    ],
)
def test_a_path_without_a_name_is_one_line(folder: Path, args: list[str], message: str) -> None:
    assert message in refused(folder, *args)


@pytest.mark.parametrize("option", ["--out", "--repro"])
@pytest.mark.parametrize("place", ["model.py", "model.py/in", "/proc/new"])
def test_where_nothing_can_be_written_nothing_runs(folder: Path, option: str, place: str) -> None:
    message = refused(folder, "compare", "--ref", "absent.onnx", "--cand", "pytorch", option, place)
    assert f"{place}: no folder that can be written into" in message


@pytest.mark.parametrize("command", [["capture", "absent.onnx"], ["build", "absent.onnx"]])
def test_where_no_file_can_be_written_nothing_runs(folder: Path, command: list[str]) -> None:
    message = refused(folder, *command, "--out", "model.py/in")
    assert message.startswith("error: model.py: no folder that can be written into")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["compare", "--ref", "pytorch", "--cand", "pytorch", "--out", ""], "--out is empty"),
        (["compare", "--ref", "pytorch", "--cand", "pytorch", "--repro", ""], "'--repro': it is empty"),
        (["demo", "--out", ""], "'--out': it is empty"),
    ],
)
def test_an_empty_folder_is_refused(folder: Path, args: list[str], message: str) -> None:
    assert message in refused(folder, *args)


@pytest.mark.parametrize("samples", [1, 2])
def test_a_full_disk_while_reporting_costs_no_verdict(
    folder: Path, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("divergence.reports.html.render_html", full)
    monkeypatch.setattr("divergence.report_commands.cores", lambda: 1)
    monkeypatch.setattr("divergence.reports.beside.Writers.add", full)
    given = ["--inputs", "inputs.npz"] * samples
    status, out, err = divergence(
        folder, "compare", "--ref", "pytorch", "--cand", "pytorch", *given, "--out", "report"
    )
    assert status == 2
    assert out.startswith("PASS")
    assert err == (
        "error: report: not all reports could be written (OSError: [Errno 28] No space left on device); make "
        "room there, or name another folder\n"
    )


def test_an_unknown_key_names_the_nearest(folder: Path) -> None:
    (folder / "divergence.toml").write_text('[sources.pytorch]\nmodle = "model.py:load"\n')
    assert "'model'" in refused(folder, "compare", "--ref", "pytorch", "--cand", "pytorch")


def test_captures_that_cannot_be_used_are_refused(folder: Path) -> None:
    (folder / "empty.capture").mkdir()
    assert "the capture is empty" in refused(folder, "compare", "--ref", "pytorch", "--cand", "empty.capture")
    (folder / "cut.capture.partial").mkdir()
    assert "interrupted" in refused(folder, "compare", "--ref", "pytorch", "--cand", "cut.capture")


def test_a_capture_of_another_model_is_refused(folder: Path) -> None:
    other = llama(layers=2, hidden_size=16, intermediate_size=32)
    record(PyTorchProbe(other), inputs_for("llama"), folder / "other.capture", detail=False, progress=silent)
    message = refused(folder, "compare", "--ref", "pytorch", "--cand", "other.capture")
    assert "different models" in message


def test_a_full_disk_while_capturing_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert "the disk is full" in refused(folder, "capture", "pytorch", "--out", "run.capture")
    assert not list(folder.glob("run.capture*"))


def test_help_loads_no_framework() -> None:
    code = (
        "import sys; sys.argv = ['divergence', '--help']\n"
        "from divergence.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "import divergence\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'pandas', 'matplotlib', 'rich'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, timeout=60)


def test_an_engine_starts_before_pytorch_is_imported() -> None:
    """What `compare` imports before its first source is opened, and what a probe of engines imports."""
    code = (
        "import sys, divergence.chain, divergence.pairs, divergence.pipeline, divergence.setting\n"
        "import divergence.probes.tensorrt.probe\n"
        "assert not {'torch', 'tensorrt', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, timeout=60)


@pytest.mark.parametrize("on_a_gpu", [True, False])
def test_a_process_that_used_a_gpu_ends_once_all_is_written(on_a_gpu: bool) -> None:
    """Python itself would take models apart first, which takes a second."""
    code = f"""
import atexit, os, sys, torch
leave = os._exit
os._exit = lambda status: (os.write(1, b"left"), leave(status))
atexit.register(lambda: print("closed"))
torch.cuda.is_initialized = lambda: {on_a_gpu}
sys.argv = ["divergence", "inspect", "missing.onnx"]
from divergence.cli import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert "missing.onnx" in done.stderr
    assert done.stdout == ("closed\nleft" if on_a_gpu else "closed\n")


def test_the_public_names_are_there() -> None:
    import divergence as package

    for name in package.__all__:
        assert getattr(package, name) is not None
    assert package.capture.__name__ == "capture"


def test_progress_is_told(folder: Path) -> None:
    seen: set[str] = set()
    model = llama()
    from divergence.config import Config
    from divergence.pipeline import compare

    half = llama()
    for parameter in half.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    compare(
        model, half, inputs_for("llama"), config=Config(), progress=lambda label, done, total: seen.add(label)
    )
    assert any("noise floor" in label for label in seen) and any("replaying" in label for label in seen)


def test_several_candidates_make_a_chain(folder: Path) -> None:
    status, out, _ = divergence(
        folder, "compare", "--ref", "pytorch", "--cand", "pytorch", "--cand", "wrong", "--out", "report"
    )
    assert status == 1
    assert out.startswith("FAIL  wrong fails, by step: pytorch: none; wrong: layers.1.value\n")
    report = json.loads((folder / "report/report.json").read_text())
    assert (report["kind"], report["names"]) == ("chain", ["pytorch", "wrong"])
    assert report["steps"][1]["site"] == "layers.1.value"


@pytest.mark.parametrize(
    ("cands", "status"),
    [
        (["pytorch", "pytorch"], 0),
        (["wrong", "pytorch"], 1),
        (["pytorch", "absent.onnx"], 2),
        (["absent.onnx", "wrong"], 2),
    ],
)
def test_the_exit_status_of_a_chain(folder: Path, cands: list[str], status: int) -> None:
    options = [option for cand in cands for option in ("--cand", cand)]
    found, out, err = divergence(folder, "compare", "--ref", "pytorch", *options, "--out", "report")
    assert (found, err) == (status, "")
    assert out.startswith(("PASS", "FAIL", "ERROR")[status])
    report = json.loads((folder / "report/report.json").read_text())
    assert [c["verdict"] for c in report["comparisons"]].count("error") == cands.count("absent.onnx")


def test_the_package_is_the_command_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "divergence", "compare"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
