"""Runs a PyTorch module in another precision, without a second copy of it.

Parameters are converted a layer at a time, and back when the layer is done. Buffers are left
alone: they hold what models keep in fp32 on purpose (`inv_freq`), and rounding them would put a
fault into the noise floor that the floor is there to find. Matrix products of half-precision
operands are computed in fp32 and rounded once, as tensor cores with fp32 accumulators do; on the
CPU this is also four times faster than the native kernels where the machine has no fp16 units.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from divergence.probes.pytorch.nested import mapped, tensors_in
from divergence.probes.pytorch.observer import wrapped
from divergence.probes.pytorch.opened import opened
from divergence.probes.pytorch.placement import brought_in

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Half precisions by name."""

STORAGE = {**HALVES, "fp64": torch.float64}
"""Precisions in which tensors are stored, by name; the others only change what enters products."""

_PRODUCTS = frozenset(
    {
        functional.linear,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.addmm,
        torch.baddbmm,
        torch.einsum,
        Tensor.matmul,
        Tensor.__matmul__,
        Tensor.bmm,
        Tensor.mm,
        functional.conv1d,
        functional.conv2d,
        torch.conv1d,
        torch.conv2d,
    }
)
_SOFTMAX = frozenset({functional.softmax, torch.softmax, Tensor.softmax})
_WEIGHTED = frozenset({functional.linear, torch.addmm})
_NO_KERNEL = re.compile(r"\b(double|float64)\b", re.IGNORECASE)
_FP8_MAX = 448.0  # largest finite value of float8_e4m3fn


@contextlib.contextmanager
def reduced(layers: Sequence[nn.Module], precision: str, rest: nn.Module | None = None) -> Iterator[None]:
    """Runs `layers` in `precision` for the duration.

    Args:
        layers: modules whose parameters are converted while each runs.
        precision: one of `divergence.precision.PRECISIONS`, or `fp64`.
        rest: the whole model, to convert what lies outside `layers` too.
    """
    convert = _converter(precision)
    with contextlib.ExitStack() as active:
        if convert is not None:
            if rest is not None:
                inside = {id(m) for layer in layers for m in layer.modules()}
                outside = [m for m in rest.modules() if id(m) not in inside]
                active.enter_context(brought_in(outside))
                active.enter_context(_converted(outside, convert))
            for layer in dict.fromkeys(layers):
                active.enter_context(wrapped(layer, _in_precision(layer, convert, precision)))
        active.enter_context(_Products(precision))
        yield


def cast(value: Any, precision: str) -> Any:
    """Floating tensors in `value` (nested in tuples, lists, mappings) in the storage type of
    `precision`, cut to its finite range: a mask of -3e38 stays a large finite number in fp16."""
    dtype = STORAGE.get(precision)
    if dtype is None:
        return value
    if isinstance(value, Tensor) and value.is_floating_point():
        if value.dtype == dtype:
            return value
        if dtype is torch.float16:
            limit = torch.finfo(dtype).max
            value = torch.where(value.isfinite(), value.clamp(-limit, limit), value)
        return value.to(dtype)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(cast(v, precision) for v in value)
    if isinstance(value, list):
        return [cast(v, precision) for v in value]
    if type(value) is dict:
        return {k: cast(v, precision) for k, v in value.items()}
    return value


def _converter(precision: str) -> Callable[[Tensor], Tensor] | None:
    if precision in STORAGE:
        return lambda tensor: tensor.to(STORAGE[precision])
    if precision == "bf16-weights":
        return lambda tensor: tensor.to(torch.bfloat16).to(tensor.dtype)
    return None


def _in_precision(
    layer: nn.Module, convert: Callable[[Tensor], Tensor], precision: str
) -> Callable[..., Any]:
    modules = list(layer.modules())

    def call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with brought_in(modules), _converted(modules, convert):
            return forward(*cast(args, precision), **cast(kwargs, precision))

    return call


@contextlib.contextmanager
def _converted(modules: Sequence[nn.Module], convert: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The floating parameters that `modules` own, converted for the duration."""
    originals: list[tuple[nn.Module, str, nn.Parameter]] = []
    made: dict[int, nn.Parameter] = {}
    try:
        for module in modules:
            for name, parameter in module._parameters.items():
                if parameter is None or not parameter.is_floating_point():
                    continue
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(convert(parameter.detach()), requires_grad=False)
                originals.append((module, name, parameter))
                module._parameters[name] = made[id(parameter)]
        yield
    finally:
        for module, name, parameter in originals:
            module._parameters[name] = parameter


class _Products(TorchFunctionMode):
    """Computes matrix products as `precision` does."""

    def __init__(self, precision: str) -> None:
        super().__init__()
        self._precision = precision
        self._storage = STORAGE.get(precision)
        self._round = {"tf32": round_tf32, "fp8": round_fp8, "int8": round_int8}.get(precision)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        inside = opened(func, types, args, kwargs)
        if inside is not None:
            with self:
                return inside()
        if self._precision == "fp64" and func in _SOFTMAX and kwargs.get("dtype") is torch.float32:
            # A mask of finfo(float64).min would become -inf in fp32, and fully masked rows NaN.
            kwargs["dtype"] = torch.float64
        attention = func is functional.scaled_dot_product_attention
        if not attention and func not in _PRODUCTS:
            return _called(func, args, kwargs) if self._precision == "fp64" else func(*args, **kwargs)
        if self._round is not None:
            if self._precision == "tf32" or func in _WEIGHTED:
                args = tuple(self._rounded(func, i, a) for i, a in enumerate(args))
            return func(*args, **kwargs)
        if self._storage is None:
            return func(*args, **kwargs)
        return self._stored(func, args, kwargs, attention=attention)

    def _stored(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, attention: bool) -> Any:
        storage = self._storage
        assert storage is not None
        tensors = [a for a in tensors_in((args, kwargs)) if a.is_floating_point()]
        dtypes = {t.dtype for t in tensors}
        if storage not in dtypes:
            return func(*args, **kwargs)
        if storage is torch.float64 or attention or tensors[0].is_cuda:
            # One dtype throughout; a buffer kept in fp32 would otherwise be refused.
            if len(dtypes) > 1:
                args, kwargs = cast((args, kwargs), self._precision)
            return _called(func, args, kwargs) if storage is torch.float64 else func(*args, **kwargs)
        args, kwargs = mapped((args, kwargs), lambda t: t.float() if t.is_floating_point() else t)
        return func(*args, **kwargs).to(storage)

    def _rounded(self, func: Any, index: int, value: Any) -> Any:
        assert self._round is not None
        if not isinstance(value, Tensor) or value.dtype is not torch.float32:
            return value
        if func is torch.addmm:
            # GPT-2's Conv1D: bias, input [tokens, in], weight [in, out].
            return self._round(value, 0 if index == 2 else -1) if index else value
        if func is functional.linear and index == 2:
            return value
        return self._round(value, -1)


def _called(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func` gives for fp64 tensors; of an operator that takes none (products of grouped experts) what
    it gives for them in fp32, in fp64 again."""
    try:
        return func(*args, **kwargs)
    except RuntimeError as error:
        floating = {t.dtype for t in tensors_in((args, kwargs)) if t.is_floating_point()}
        if floating != {torch.float64} or not _NO_KERNEL.search(str(error)):
            raise
    args, kwargs = mapped((args, kwargs), lambda t: t.float() if t.is_floating_point() else t)
    return mapped(func(*args, **kwargs), lambda t: t.double() if t.is_floating_point() else t)


def round_tf32(value: Tensor, axis: int = -1) -> Tensor:  # noqa: ARG001 - one signature for all
    """Rounds fp32 to the 10 explicit mantissa bits of TF32, ties to even (NVIDIA A100 whitepaper)."""
    bits = value.contiguous().view(torch.int32)
    rounded = bits + 0xFFF + ((bits >> 13) & 1)
    return torch.where(value.isfinite(), (rounded & ~0x1FFF).view(torch.float32), value)


def round_fp8(value: Tensor, axis: int = -1) -> Tensor:  # noqa: ARG001 - one signature for all
    """Rounds through float8 e4m3 with one scale for the tensor, its largest value at 448."""
    scale = value.abs().amax().clamp(min=torch.finfo(value.dtype).tiny) / _FP8_MAX
    return (value / scale).to(torch.float8_e4m3fn).to(value.dtype) * scale


def round_int8(value: Tensor, axis: int = -1) -> Tensor:
    """Rounds through symmetric int8 with one scale for every slice along `axis` (a row of
    activations, an output channel of weights)."""
    scale = value.abs().amax(axis, keepdim=True).clamp(min=torch.finfo(value.dtype).tiny) / 127
    return (value / scale).round().clamp(-127, 127) * scale
