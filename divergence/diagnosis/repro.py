"""A folder that replays the first layer that fails, alone: the layer, its input, both outputs, a script."""

from __future__ import annotations

import contextlib
import pickletools
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING

import torch
from torch import nn

from divergence.diagnosis.emulate import LayerUnit
from divergence.errors import SourceError, one_line
from divergence.inputs import USER_MODULE
from divergence.probes.pytorch.layer_call import replaced, snapshots
from divergence.probes.pytorch.placement import unhooked

if TYPE_CHECKING:
    from divergence.diagnosis.case import Case

_PROTOCOL = 3
"""Of pickle: the only one that writes the names of modules as they are, each in one piece."""

_SCRIPT = '''"""Replays {site} alone: the reference's layer on the candidate's own input to it.

    python replay.py
"""

import importlib.util
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
FOLDERS = {folders}
FILES = {files}

sys.path += [folder for folder in FOLDERS if folder not in sys.path]
for name, file in FILES.items():  # what the layer's classes are pickled as; a copy lies here, in case
    found = file if Path(file).is_file() else HERE / f"{{name}}.py"
    spec = importlib.util.spec_from_file_location(name, found)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])

layer = torch.load(HERE / "layer.pt", weights_only=False).eval()  # pickled: run only what you trust
given = torch.load(HERE / "inputs.pt", weights_only=False)
tensors = torch.load(HERE / "tensors.pt")

with torch.inference_mode():
    output = layer(*given["args"], **given["kwargs"])
hidden = output if isinstance(output, torch.Tensor) else output[0]
again = float((hidden - tensors["reference"]["hidden"]).abs().max())
print(f"replayed hidden against the recorded reference: max difference {{again:.3g}}")
for name, seen in tensors["candidate"].items():
    clean = tensors["reference"][name].double()
    error = float((seen.double() - clean).norm() / clean.norm())
    print(f"{{name}}: the candidate is off by {{error:.3g}} (relative L2)")
'''


def write(folder: Path, case: Case) -> str:
    """Writes the folder for a case and returns a remark for the report.

    Args:
        folder: to make; files of the same names in it are replaced.
        case: of the first layer that fails.

    Raises:
        SourceError: the layer cannot be pickled (its class is not importable), or the folder not written.
    """
    unit = case.unit
    if not isinstance(unit, LayerUnit):
        return f"{case.at} lies outside the layers: there is no layer to replay alone"
    call = unit.call
    assert call.hidden_at is not None
    args, kwargs = replaced(call.args, call.kwargs, call.hidden_at, unit.hidden.clone())
    given = dict(zip(("args", "kwargs"), snapshots(args, kwargs, call.layer), strict=True))
    tensors = {
        "reference": {name: tensor.clone() for name, tensor in case.clean.items()},
        "candidate": {name: tensor.clone() for name, tensor in case.candidate.items()},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with unhooked(call.module), _in_its_module(call.module):
            torch.save(call.module, folder / "layer.pt", pickle_protocol=_PROTOCOL)
        torch.save(given, folder / "inputs.pt", pickle_protocol=_PROTOCOL)
        torch.save(tensors, folder / "tensors.pt")
        needed = _modules(folder / "layer.pt") | _modules(folder / "inputs.pt")
        folders, files = _folders(), _files(needed)
        for name, file in files.items():
            shutil.copyfile(file, folder / f"{name}.py")
        script = _SCRIPT.format(site=case.at, folders=folders, files=files)
        (folder / "replay.py").write_text(script, encoding="utf-8")
    except Exception as error:
        raise SourceError(
            f"{folder}: {case.at} cannot be written for replay ({one_line(error)}); define the layer's "
            "class at "
            "the top level of a module that can be imported, or leave out --repro"
        ) from error
    if lost := sorted(name for name in needed - files.keys() if not _is_found(name, folders)):
        return (
            f"{case.at} is in {folder}, but replay.py cannot load it: it needs {', '.join(lost)}, which no "
            "other process finds; define the layer's class in a file that can be imported"
        )
    return f"{case.at} can be replayed alone: python {folder / 'replay.py'}"


@contextlib.contextmanager
def _in_its_module(layer: nn.Module) -> Iterator[None]:
    """Puts what a layer is made of where pickle looks for it: a user's file is run anew for every source, and
    its module holds what the last run of it made."""
    held = [value for part in layer.modules() for value in (type(part), *vars(part).values())]
    made = {value if isinstance(value, type | FunctionType) else type(value) for value in held}
    with contextlib.ExitStack() as back:
        for thing in made:
            home, name = sys.modules.get(thing.__module__), thing.__qualname__
            if thing.__module__.startswith(USER_MODULE) and getattr(home, name, thing) is not thing:
                back.callback(setattr, home, name, getattr(home, name))
                setattr(home, name, thing)
        yield


def _modules(file: Path) -> set[str]:
    """The modules that opening a file of `torch.save` imports."""
    with zipfile.ZipFile(file) as archive:
        pickled = b"".join(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
    named = (argument for opcode, argument, _ in pickletools.genops(pickled) if opcode.name == "GLOBAL")
    return {str(name).partition(" ")[0] for name in named}


def _files(modules: Iterable[str]) -> dict[str, str]:
    """Files of users that are run as modules of another name, by that name."""
    own = {name: sys.modules[name].__file__ for name in sorted(modules) if name.startswith(USER_MODULE)}
    return {name: file for name, file in own.items() if file}


def _folders() -> list[str]:
    """Where this process finds modules, beside what is installed."""
    installed = {Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
    here = [Path(folder).absolute() for folder in sys.path]
    own = [path for path in here if path.is_dir() and not installed & set(path.resolve().parents)]
    return [str(path) for path in own]


def _is_found(module: str, folders: Sequence[str]) -> bool:
    """Whether another process that looks into `folders`, too, finds a module."""
    top = module.partition(".")[0]
    if top in sys.builtin_module_names:
        return True
    # A program's own file is called __main__ only while it runs.
    return top != "__main__" and PathFinder.find_spec(top, [*sys.path, *folders]) is not None
