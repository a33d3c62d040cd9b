"""The operators that a layer runs, in order, and how each depends on the layer's input.

A trace is taken once per layer. Running the same layer again calls the same operators in the same
order, so an operator is addressed by its number, and an emulation changes what number n returns.
That needs no knowledge of the model's classes and reaches whatever torch function they call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from divergence.probes.pytorch.nested import tensors_in
from divergence.probes.pytorch.opened import opened

if TYPE_CHECKING:
    from divergence.diagnosis.emulate import Fault

_ALIASES = {
    "rmul": "mul",
    "imul": "mul",
    "multiply": "mul",
    "radd": "add",
    "iadd": "add",
    "isub": "sub",
    "subtract": "sub",
    "truediv": "div",
    "itruediv": "div",
    "divide": "div",
    "bmm": "matmul",
    "baddbmm": "matmul",
    "mm": "matmul",
    "einsum": "matmul",
    "masked_fill": "where",
}

_IN_PLACE = frozenset({"__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__", "__ipow__"})

ACTIVATING = frozenset(
    {"gelu", "silu", "relu", "relu6", "sigmoid", "tanh", "elu", "leaky_relu", "hardswish", "mish"}
)
"""Activation functions."""

COSTLY = ACTIVATING | {"linear", "addmm", "matmul", "softmax", "scaled_dot_product_attention"}
"""Operators whose results are worth keeping."""

STRUCTURAL = frozenset(
    {
        *(
            "view",
            "reshape",
            "transpose",
            "permute",
            "contiguous",
            "getitem",
            "get",
            "expand",
            "cat",
            "concat",
        ),
        *("stack", "chunk", "split", "unbind", "unsqueeze", "squeeze", "flatten", "unflatten", "to", "float"),
        *("type_as", "half", "bfloat16", "clone", "neg", "repeat", "repeat_interleave", "select", "narrow"),
        *(
            "view_as_complex",
            "view_as_real",
            "movedim",
            "swapaxes",
            "dropout",
            "tensor_split",
            "index_select",
        ),
        *("type", "double", "view_as", "expand_as", "reshape_as", "T", "roll", "flip"),
    }
)
"""Operators that only move, copy, cast or negate."""

PIECES = frozenset({"split", "chunk", "tensor_split"})
"""Operators that take a fused parameter apart: what they return goes by its name."""


@dataclass(frozen=True)
class Operator:
    """One call of a torch function.

    Attributes:
        index: its number in the run.
        name: what it computes: `mul` for `*`, `torch.mul` and `Tensor.mul` alike.
        inputs: numbers of the operators that made its tensor arguments, None for those from elsewhere.
        parameters: names of the layer's parameters among its arguments, pieces of them included.
        scalars: numbers among its arguments, tensors of one element included.
        shape, dtype: of its result (of the first tensor of several).
        depends: whether it depends on the layer's hidden input.
        dependent: for each tensor argument whether that does.
    """

    index: int
    name: str
    inputs: tuple[int | None, ...]
    parameters: tuple[str, ...]
    scalars: tuple[float, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    depends: bool
    dependent: tuple[bool, ...]


@dataclass
class Trace:
    """Operators of one run by number, and the operator that made the tensor of each site.

    Attributes:
        operators: by number; calls that return no tensor have none.
        constants: for products with a tensor that does not depend on the hidden input, that tensor by the
            operator's number.
        results: what the costly operators returned, by number.
        sites: number of the operator that made a site's tensor, by the tensor's name.
    """

    operators: dict[int, Operator] = field(default_factory=dict)
    constants: dict[int, Tensor] = field(default_factory=dict)
    results: dict[int, Tensor] = field(default_factory=dict)
    sites: dict[str, int] = field(default_factory=dict)
    _made: dict[int, tuple[weakref.ref[Tensor], int, bool]] = field(default_factory=dict)
    _parameters: dict[int, str] = field(default_factory=dict)
    _pieces: dict[int, tuple[weakref.ref[Tensor], str]] = field(default_factory=dict)
    # By address: probes look at views that no call in the trace made.
    _stored: dict[int, int] = field(default_factory=dict)

    def name_parameters(self, named: Mapping[str, Tensor]) -> None:
        """Makes the trace know parameters by name."""
        self._parameters = {id(tensor): name for name, tensor in named.items()}

    def mark_input(self, tensor: Tensor) -> None:
        """Marks the layer's hidden input."""
        self._made[id(tensor)] = (weakref.ref(tensor), -1, True)

    def mark_site(self, name: str, tensor: Tensor) -> None:
        """Notes which operator made the tensor of a site, be it of the encoder's states alone."""
        found = self._of(tensor)
        index = found[0] if found is not None and found[0] >= 0 else self._stored.get(_address(tensor))
        if index is not None:
            self.sites[name] = index

    def record(
        self, index: int, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """Adds a call."""
        name = operator_name(func)
        # Writing into a slice returns nothing and changes its first argument.
        outputs = list(tensors_in(args[0] if name == "setitem" else result))
        if not outputs:
            return
        arguments = list(tensors_in((args, kwargs)))
        origins = [self._of(t) for t in arguments]
        dependent = tuple(o is not None and o[1] for o in origins)
        scalars = [float(v) for v in (*args, *kwargs.values()) if isinstance(v, int | float)]
        scalars += [
            float(t)
            for t, d in zip(arguments, dependent, strict=True)
            if t.numel() == 1 and not d and not t.is_complex()
        ]
        depends = any(dependent)
        self.operators[index] = Operator(
            index,
            name,
            tuple(None if o is None or o[0] < 0 else o[0] for o in origins),
            tuple(known for known in map(self._parameter, arguments) if known is not None),
            tuple(scalars),
            tuple(outputs[0].shape),
            outputs[0].dtype,
            depends,
            dependent,
        )
        if name == "mul" and depends and len(arguments) == 2 and not all(dependent):
            self.constants[index] = arguments[dependent.index(False)]
        if depends and name in COSTLY and isinstance(result, Tensor):
            self.results[index] = result
        if _in_place(func):
            self._forget(outputs[0])
            self._write(outputs[0], index, depends)
        fused = self._parameter(arguments[0]) if name in PIECES else None
        if fused is not None:
            self._pieces |= {id(tensor): (weakref.ref(tensor), fused) for tensor in outputs}
        for tensor in outputs:
            self._made[id(tensor)] = (weakref.ref(tensor), index, depends)
            self._stored[_address(tensor)] = index

    def unchanged(self, fault: Fault, *, products: bool) -> dict[int, Tensor]:
        """Results of costly operators that `fault` cannot change, by number.

        Args:
            fault: what is put in.
            products: also those of attention, which probes read keys and values from.
        """
        if fault.hidden is not None:
            return {}
        dirty = set(fault.operators()) if fault.operators else set()
        for operator in self.operators.values():
            touched = any(name in fault.parameters for name in operator.parameters)
            if touched or any(i in dirty for i in operator.inputs):
                dirty.add(operator.index)
        kept = {i: t for i, t in self.results.items() if i not in dirty}
        return kept if products else {i: t for i, t in kept.items() if self._plain(i)}

    def skippable(self, site: str) -> list[int]:
        """Numbers of costly operators that the tensor of `site` does not depend on, products of
        attention left out."""
        made = self.sites.get(site)
        if made is None:
            return []
        needed = self.ancestors(made)
        return [i for i in self.results if i not in needed and self._plain(i)]

    def _plain(self, index: int) -> bool:
        """Whether an operator is no product of attention."""
        operator = self.operators[index]
        if operator.name in ACTIVATING or operator.name in ("softmax", "scaled_dot_product_attention"):
            return operator.name in ACTIVATING
        # A mask may be added to the product, and keys of an encoder do not depend on the hidden input.
        sides = zip(operator.inputs, operator.dependent, strict=True)
        return sum(depends or self._projected(made) for made, depends in sides) < 2

    def _projected(self, index: int | None) -> bool:
        """Whether a tensor from the operator of this number went through a product."""
        above = set() if index is None else self.ancestors(index)
        return any(self.operators[i].name in ("linear", "addmm", "matmul") for i in above)

    def _write(self, tensor: Tensor, index: int, depends: bool) -> None:  # noqa: FBT001 - as it is kept
        """Has what a tensor that was written into is a part of come from there (keys that are put together by
        writing into an empty tensor)."""
        written = _address(tensor)
        for known, (ref, made, before) in list(self._made.items()):
            whole = ref()
            if whole is not None and made >= 0 and _address(whole) == written:
                self._made[known] = (ref, index, before or depends)

    def _forget(self, tensor: Tensor) -> None:
        """Drops results that share memory with a tensor that was written into."""
        written = _address(tensor)
        self.results = {i: t for i, t in self.results.items() if _address(t) != written}

    def ancestors(self, index: int) -> set[int]:
        """Numbers of all operators that `index` depends on, itself included."""
        seen: set[int] = set()
        waiting = [index]
        while waiting:
            at = waiting.pop()
            if at in seen or at not in self.operators:
                continue
            seen.add(at)
            waiting.extend(i for i in self.operators[at].inputs if i is not None)
        return seen

    def upstream(self, index: int, through: frozenset[str] = STRUCTURAL) -> Iterator[Operator]:
        """The operators above `index`, nearest first, going on only through those named."""
        seen: set[int] = set()
        waiting = [i for i in self.operators[index].inputs if i is not None]
        while waiting:
            at = max(waiting)
            waiting.remove(at)
            if at in seen:
                continue
            seen.add(at)
            operator = self.operators[at]
            yield operator
            if operator.name in through:
                waiting.extend(i for i in operator.inputs if i is not None)

    def named(self, *names: str) -> list[Operator]:
        """Operators of these names that depend on the hidden input, in order."""
        return [o for o in self.operators.values() if o.name in names and o.depends]

    def reaches(self, site: str, index: int) -> bool:
        """Whether what operator `index` returns can change the tensor of `site`."""
        made = self.sites.get(site)
        return made is None or index in self.ancestors(made)

    def reaching(self, site: str) -> set[str]:
        """Names of the parameters that the tensor of `site` depends on."""
        made = self.sites.get(site)
        members = self.operators if made is None else self.ancestors(made)
        return {name for index in members for name in self.operators[index].parameters}

    def _parameter(self, tensor: Tensor) -> str | None:
        """Name of the parameter that a tensor is, or is a piece of."""
        piece = self._pieces.get(id(tensor))
        if piece is not None and piece[0]() is tensor:
            return piece[1]
        return self._parameters.get(id(tensor))

    def _of(self, tensor: Tensor) -> tuple[int, bool] | None:
        found = self._made.get(id(tensor))
        if found is None or found[0]() is not tensor:
            return None
        return found[1], found[2]


@dataclass(frozen=True)
class Call:
    """A call of a torch function that an emulation may change."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> Any:
        """What the function itself returns."""
        return self.func(*self.args, **self.kwargs)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """The argument at `position` or of that name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def replaced(self, position: int, name: str, value: Any) -> Call:
        """The call with that argument replaced."""
        if position < len(self.args):
            return Call(self.func, (*self.args[:position], value, *self.args[position + 1 :]), self.kwargs)
        return Call(self.func, self.args, {**self.kwargs, name: value})


Handler = Callable[[Call], Any]
"""Returns what a call is to return."""


class Interceptor(TorchFunctionMode):
    """Numbers the calls of torch functions while active.

    Args:
        handlers: what to do instead of operator n; several are applied one around the other.
        trace: records the calls.
    """

    def __init__(self, handlers: Mapping[int, Sequence[Handler]], trace: Trace | None = None) -> None:
        super().__init__()
        self._handlers = handlers
        self._trace = trace
        self._count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        inside = opened(func, types, args, kwargs)
        if inside is not None:
            with self:
                return inside()
        index = self._count
        self._count += 1
        call = Call(func, args, dict(kwargs or {}))
        for handler in self._handlers.get(index, ()):
            call = Call(_around(handler, call), call.args, call.kwargs)
        result = call.run()
        if self._trace is not None:
            self._trace.record(index, func, args, call.kwargs, result)
        return result


def _around(handler: Handler, inner: Call) -> Callable[..., Any]:
    return lambda *args, **kwargs: handler(Call(inner.func, args, kwargs))


def operator_name(func: Any) -> str:
    """`mul` for `Tensor.__mul__`, `Tensor.__rmul__`, `Tensor.mul_` and `torch.mul`."""
    name = str(getattr(func, "__name__", func)).strip("_")
    return _ALIASES.get(name, name)


def _in_place(func: Any) -> bool:
    """Whether a torch function writes into its first argument."""
    name = str(getattr(func, "__name__", ""))
    dunder = name.startswith("__")
    return (dunder and name in _IN_PLACE) or (not dunder and name.endswith("_"))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
