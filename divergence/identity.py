"""The identity of a module: a digest of all that decides what it computes.

Two modules of one identity give the same result on the same inputs, so that a run of one may stand
for the other's. It covers what `divergence.captures.fingerprint` leaves out: buffers, attributes,
the code of every class and function within, and the order of the weights. What it cannot look
into has no identity and is run again: a wrong miss costs a run, a wrong hit a verdict.
"""

from __future__ import annotations

import enum
import functools
import hashlib
from collections.abc import Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_PLAIN = (type(None), bool, int, float, complex, str, bytes)


class _OpaqueError(Exception):
    """Something that cannot be looked into."""


def identity(model: torch.nn.Module) -> str | None:
    """Digest of `model` (64 hex digits), or None where part of it cannot be looked into.

    All weights are read once and hashed by SHA-256. A function that a class's code calls counts by
    its own code, one level deep: what a library does further below is taken to stay the same.
    """
    walk = _Walk()
    try:
        walk.add(model)
    except (_OpaqueError, RecursionError, ValueError):  # ValueError: an empty cell of a closure
        return None
    return walk.digest.hexdigest()


class _Walk:
    """Feeds a digest with everything that can be reached; what was seen before enters by its number."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._seen: dict[int, int] = {}
        self._kept: list[object] = []  # an id is of use only while its object lives

    def _write(self, *parts: object) -> None:
        text = "\x1f".join(map(str, parts))
        self.digest.update(f"{len(text)}:{text}".encode("utf-8", "surrogatepass"))

    def add(self, value: Any) -> None:
        """Feeds `value` and all that it holds."""
        import torch

        if isinstance(value, enum.Enum):
            self._write("enum", type(value).__qualname__, value.name)
        elif type(value) in _PLAIN:
            self._write(type(value).__name__, repr(value))
        elif isinstance(value, torch.dtype | torch.device | torch.Size | torch.layout | torch.memory_format):
            self._write("torch", repr(value))
        elif isinstance(value, BuiltinFunctionType):
            self._write("builtin", value.__module__, value.__qualname__)
        elif id(value) in self._seen:
            self._write("again", self._seen[id(value)])
        else:
            self._seen[id(value)] = len(self._seen)
            self._kept.append(value)
            self._new(value)

    def _new(self, value: Any) -> None:
        import torch

        if isinstance(value, torch.Tensor):
            self._tensor(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, MethodType):
            self._items("method", (value.__func__, value.__self__))
        elif isinstance(value, functools.partial):
            self._items("partial", (value.func, value.args, value.keywords))
        elif isinstance(value, set | frozenset):
            if not all(type(item) in _PLAIN for item in value):
                raise _OpaqueError
            self._write("set", sorted(map(repr, value)))
        else:
            self._object(value)

    def _items(self, kind: str, items: Any) -> None:
        self._write(kind, len(items))
        for item in items:
            self.add(item)

    def _object(self, value: Any) -> None:
        """A container, an object with attributes, or both (a dict with attributes)."""
        kind = type(value)
        self.add(kind)
        held = False
        if isinstance(value, Mapping):
            self._items("mapping", [part for pair in value.items() for part in pair])
            held = True
        elif isinstance(value, list | tuple):
            self._items("sequence", list(value))
            held = True
        if any(c.__dict__.get("__slots__") for c in kind.__mro__ if c.__module__ not in _CONTAINERS):
            raise _OpaqueError
        attributes = getattr(value, "__dict__", None)
        if attributes is None and not held:
            raise _OpaqueError
        if attributes:
            self._items("attributes", [part for pair in attributes.items() for part in pair])

    def _tensor(self, value: torch.Tensor) -> None:
        import torch

        plain = type(value) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
        if (
            not plain
            or value.layout is not torch.strided
            or value.device.type == "meta"
            or value.is_quantized
        ):
            raise _OpaqueError
        self._write("tensor", value.dtype, list(value.shape), value.device)
        flat = value.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            self.digest.update(flat.view(torch.uint8).numpy().data)

    def _class(self, value: type) -> None:
        import torch

        self._write("class", value.__module__, value.__qualname__)
        for base in value.__mro__:
            if base in (object, torch.nn.Module) or base.__module__ == "builtins":
                break
            for name, member in vars(base).items():
                for function in _functions(member):
                    self._write(name)
                    self._code(function.__code__)
                    self._called(function)

    def _function(self, value: FunctionType) -> None:
        self._write("function", value.__module__, value.__qualname__)
        self._code(value.__code__)
        self._called(value)
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        self._items("bound", [*cells, value.__defaults__, value.__kwdefaults__])

    def _called(self, function: FunctionType) -> None:
        """The globals of the function's module that its code names, which a test may have replaced."""
        for name in function.__code__.co_names:
            found = function.__globals__.get(name)
            if isinstance(found, FunctionType):
                self._write(name)
                self._code(found.__code__)
            elif type(found) in _PLAIN and found is not None:
                self._write(name, repr(found))

    def _code(self, code: CodeType) -> None:
        self._write("code", code.co_code.hex(), code.co_names, code.co_varnames)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self._code(constant)
            elif isinstance(constant, frozenset):
                self._write(sorted(map(repr, constant)))
            else:
                self._write(repr(constant))


_CONTAINERS = frozenset({"builtins", "collections", "collections.abc", "typing", "abc"})


def _functions(member: object) -> list[FunctionType]:
    """The functions of a class's member: itself, or what a method or property of it wraps."""
    wrapped = (
        (member.fget, member.fset) if isinstance(member, property) else (getattr(member, "__func__", member),)
    )
    return [f for f in wrapped if isinstance(f, FunctionType)]
