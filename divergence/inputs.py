"""Inputs: the tensors that a source is run on."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from divergence.errors import DivergenceError, InputError, SourceError, nearest, one_line
from divergence.working import in_background

if TYPE_CHECKING:
    import numpy as np
    import torch

Given: TypeAlias = "Mapping[str, torch.Tensor | np.ndarray[Any, Any]] | str | Path"
"""Inputs as they are given: by name, or where to load them from."""

FORMS = "a .safetensors or .npz file, FILE.py:FUNC or MODULE:FUNC"
USER_MODULE = "divergence_user_"  # what the module that a FILE.py is run as is called, and more
_ON_DEVICE = 64 << 20
"""Most bytes of an input that is copied within a device's memory."""
_PICKLES = frozenset({".pt", ".pth", ".bin", ".pkl", ".pickle"})


def load_inputs(spec: str, base: Path) -> dict[str, torch.Tensor]:
    """Loads inputs.

    Args:
        spec: a `.safetensors` or `.npz` file or its URL, or `FILE.py:FUNC` or `MODULE:FUNC` naming a
            function without arguments that returns a mapping of input names to tensors or numpy arrays.
        base: folder that a relative file, or the module, is looked for in.

    Returns:
        Tensors by input name, in the order of the file or mapping. Arrays are not copied unless
        they are read-only or in a layout that torch does not have. NaN and infinities are kept.

    Raises:
        InputError: there is no such file or function, it is a pickle, it fails, or gives no tensors.
        StorageError: the URL cannot be read.
    """
    if "://" in spec:
        return _from_url(spec, base)
    if ":" in spec and Path(spec).suffix not in {".safetensors", ".npz"}:
        return _from_function(spec, base)
    file = base / spec
    suffix = file.suffix.lower()
    if suffix in _PICKLES:
        raise InputError(
            f"{file}: a {suffix} file is a pickle, which runs code when it is opened; save the tensors with "
            "safetensors.torch.save_file(tensors, 'inputs.safetensors') instead"
        )
    if suffix not in {".safetensors", ".npz"}:
        raise InputError(f"{file}: inputs cannot be read from this; give {FORMS}")
    if not file.is_file():
        raise InputError(f"{file}: no such file; give {FORMS}")
    loaded = _load_safetensors(file) if suffix == ".safetensors" else _load_npz(file)
    return _checked(loaded, str(file))


def as_inputs(given: object) -> dict[str, torch.Tensor]:
    """The tensors by input name of a mapping that holds tensors or numpy arrays.

    Raises:
        InputError: it is no mapping, or holds something else.
    """
    if not isinstance(given, Mapping):
        raise InputError(
            f"inputs is a {type(given).__name__}; give a mapping by input name, such as "
            f"{{'input_ids': tensor}}, or where to load one from: {FORMS}"
        )
    return _checked(given, "the mapping") if given else {}


def digest(inputs: Mapping[str, torch.Tensor]) -> str:
    """Digest (16 hex digits) of names, shapes, dtypes and contents, whatever the order or device."""
    import torch

    found = hashlib.sha256()
    for name in sorted(inputs):
        tensor = inputs[name].detach()
        header = [name, list(tensor.shape), str(tensor.dtype)]
        found.update(json.dumps(header).encode())
        found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


class Digesting:
    """The digest of what is in `inputs` now, made on a thread from `begin` on.

    A device copies them within its own memory before its next kernel, and from there to the host beside it,
    so that no model is waited for.

    Args:
        inputs: by name.
    """

    def __init__(self, inputs: Mapping[str, torch.Tensor]) -> None:
        import torch

        # Copies, for a model may write into its inputs.
        self._copies = {
            name: tensor.detach().to("cpu" if tensor.nbytes > _ON_DEVICE else tensor.device, copy=True)
            for name, tensor in inputs.items()
        }
        devices = {tensor.device for tensor in self._copies.values() if tensor.is_cuda}
        self._copied = [torch.cuda.current_stream(device).record_event() for device in devices]
        self._result: Future[str] | None = None

    def begin(self) -> None:
        """Starts, unless it has: a thread takes a while to start, which a device need not wait for."""
        if self._result is None:
            self._result = in_background(self._digest, "digest-inputs")

    def result(self) -> str:
        """As `digest` gives; waits for it."""
        self.begin()
        assert self._result is not None
        return self._result.result()

    def _digest(self) -> str:
        import torch

        with contextlib.ExitStack() as beside:
            for event in self._copied:
                stream = torch.cuda.Stream(event.device)
                stream.wait_event(event)
                beside.enter_context(torch.cuda.stream(stream))
            return digest(self._copies)


def called(
    declared: Sequence[str], inputs: Mapping[str, torch.Tensor], path: str, what: str
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """`inputs` as a file declares them. Where it declares one and one is given, that is it, whatever they are
    called: exporters call inputs `input.1`, too.

    Args:
        declared: names of its inputs.
        inputs: by our names.
        path, what: the file, and what is in it, in a word.

    Returns:
        Tensors by the names declared, and remarks.

    Raises:
        InputError: one is missing.
    """
    missing = [name for name in declared if name not in inputs]
    unused = [name for name in inputs if name not in declared]
    if len(missing) == len(declared) == len(inputs) == 1:
        note = f"Input {unused[0]} was given as {missing[0]}, the only one of the {what}."
        return {missing[0]: inputs[unused[0]]}, [note]
    if missing:
        absent, takes, given = (
            ", ".join(f"'{name}'" for name in names) or "none" for names in (missing, declared, inputs)
        )
        renamed = f'{{ "{missing[0]}" = "{unused[0] if unused else "OURS"}" }}'
        raise InputError(
            f"{path}: the {what}'s inputs {absent} are missing; it takes {takes}, given are {given}"
            f"{nearest(missing[0], unused)}; where names differ, write inputs = {renamed} under "
            "[sources.NAME] in divergence.toml"
        )
    notes = [f"Input {name} was left out: the {what} does not take it." for name in unused]
    return {name: inputs[name] for name in declared}, notes


def import_callable(spec: str, base: Path) -> Callable[..., Any]:
    """Imports the callable that `spec` names.

    The folder of the file, or `base` for a module, is put first on `sys.path`, as `python FILE.py`
    does, and stays there: the function may import its neighbours when it is called. A file is run
    anew every time, so that an edit counts.

    Args:
        spec: `FILE.py:FUNC` or `MODULE:FUNC`; `FUNC` may be dotted (`Class.method`).
        base: folder that a relative file, or the module, is looked for in.

    Raises:
        SourceError: there is no such file, module or callable, or importing it raises.
    """
    target, separator, function = spec.rpartition(":")
    if not separator or not target or not function:
        raise SourceError(f"'{spec}' names no function; write it as FILE.py:FUNC or MODULE:FUNC")
    module = _import_file(base / target) if target.endswith(".py") else _import_module(target, base)
    found: Any = module
    for part in function.split("."):
        if not hasattr(found, part):
            known = [n for n in dir(found) if not n.startswith("_") and callable(getattr(found, n))]
            raise SourceError(f"{target}: has no function '{function}'{nearest(part, known)}")
        found = getattr(found, part)
    if not callable(found):
        raise SourceError(f"{target}: '{function}' is {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]


def describe_exception(error: BaseException, file: str | None = None) -> str:
    """What a user's code raised, in one line: type, message, and the line of the user's file.

    Args:
        error: the exception.
        file: path of the user's file; without it, or where no frame is in it, the innermost frame counts.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{one_line(error)} at {Path(error.filename).name}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    if file is not None and len(frames) == 1:  # the call itself: no line of the file has run
        return f"{one_line(error)}, when called without arguments, in {Path(file).name}"
    own = [frame for frame in frames if frame.filename == file] or list(frames)
    return (
        f"{one_line(error)} at {Path(own[-1].filename).name}, line {own[-1].lineno}"
        if own
        else one_line(error)
    )


def _import_file(file: Path) -> ModuleType:
    file = file.absolute()
    if not file.is_file():
        siblings = [p.name for p in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise SourceError(f"{file}: no such file{nearest(file.name, siblings)}")
    _put_on_path(file.parent)
    name = f"{USER_MODULE}{file.stem}_{hashlib.sha256(os.fsencode(file)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise SourceError(f"{file}: cannot be imported as a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling look a class's module up by name while and after it is made.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise SourceError(f"{file}: cannot be imported: {describe_exception(error, str(file))}") from error
    return module


def _import_module(name: str, base: Path) -> ModuleType:
    _put_on_path(base.absolute())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise SourceError(f"module {name}: cannot be imported: {describe_exception(error)}") from error
        raise SourceError(
            f"module {name}: not found in {base.absolute()} nor installed; write a file as FILE.py:FUNC"
        ) from error
    except (Exception, SystemExit) as error:
        raise SourceError(f"module {name}: cannot be imported: {describe_exception(error)}") from error


def _put_on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()


def _from_function(spec: str, base: Path) -> dict[str, torch.Tensor]:
    try:
        function = import_callable(spec, base)
    except SourceError as error:
        raise InputError(f"inputs: {error}") from error
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    try:
        made = function()
    except DivergenceError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"inputs: {spec} raised {describe_exception(error, file)}") from error
    if not isinstance(made, Mapping):
        raise InputError(
            f"inputs: {spec} returned {type(made).__name__}; "
            "return a mapping of input names to tensors or arrays"
        )
    return _checked(made, spec)


def _from_url(url: str, base: Path) -> dict[str, torch.Tensor]:
    from divergence.storage import fetched, located

    place = located(url)
    if isinstance(place, Path):
        return load_inputs(str(place), base)
    with fetched(url) as file:
        try:
            # Tensors may map the file, which is deleted now.
            return {name: tensor.clone() for name, tensor in load_inputs(str(file), base).items()}
        except InputError as error:
            raise InputError(str(error).replace(str(file), url)) from error


def _load_safetensors(file: Path) -> Mapping[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: cannot be read ({one_line(error)}); save it again") from error


def _load_npz(file: Path) -> Mapping[str, np.ndarray]:
    import zipfile

    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{file}: cannot be read ({one_line(error)}); "
            "save numeric arrays with numpy.savez(file, name=array)"
        ) from error


def _checked(made: Mapping[Any, Any], where: str) -> dict[str, torch.Tensor]:
    if not made:
        raise InputError(f"inputs: {where} is empty; give the model's inputs by name")
    tensors = {}
    for name, value in made.items():
        if not isinstance(name, str) or not name:
            raise InputError(f"inputs: {where} has the name {name!r}; names of inputs are texts")
        tensors[name] = _as_tensor(value, f"input '{name}' of {where}")
    return tensors


def _as_tensor(value: Any, where: str) -> torch.Tensor:
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach()
    if not isinstance(value, np.ndarray | np.generic):
        raise InputError(f"{where} is {type(value).__name__}; give a torch tensor or a numpy array")
    array = np.asarray(value)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    # Torch has neither negative strides nor read-only memory, in which a model may write.
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    # bfloat16 and fp8 of ml_dtypes are opaque to torch: it gets the bits and is told what they are.
    dtype = getattr(torch, array.dtype.name, None)
    if array.dtype.kind == "V" and isinstance(dtype, torch.dtype):
        bits = np.dtype(f"u{array.dtype.itemsize}")
        return torch.from_numpy(array.view(bits)).view(dtype)
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise InputError(f"{where} has dtype {array.dtype}, which torch does not have") from error
