"""Opens functions that a torch function mode sees as one call, though they call torch functions.

`torch.nn.functional.multi_head_attention_forward`, which `nn.MultiheadAttention` and with it
`nn.TransformerEncoderLayer` run in, hands itself over to the mode as a whole, and what it calls is
then seen by no mode: neither its projections nor its attention product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from types import FunctionType
from typing import Any

from torch import Tensor
from torch.nn import functional

_BATCH: ContextVar[int] = ContextVar("batch", default=0)


def opened(
    func: Any, types: Sequence[type], args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> Callable[[], Any] | None:
    """The same call with its inner calls to be seen, for a mode to make with itself active; None where `func`
    hides none.

    Args:
        func: the torch function that a mode is to run.
        types: of its arguments as the mode was told them: a class of tensors may have a function of its own.
        args, kwargs: of the call.
    """
    if func is not functional.multi_head_attention_forward or not isinstance(func, FunctionType):
        return None
    if "has_torch_function" not in func.__code__.co_names or any(kind is not Tensor for kind in types):
        return None
    # Its first question is whether any mode or class wants it; told no, it goes on. All else is its own code,
    # with what its module holds now.
    answering = {**func.__globals__, "has_torch_function": _nobody}
    inside = FunctionType(func.__code__, answering, func.__name__, func.__defaults__, func.__closure__)
    inside.__kwdefaults__ = func.__kwdefaults__
    query = args[0]  # [token, batch, channel] whatever the layout of the module, or [token, channel]
    batch = query.shape[1] if query.dim() == 3 else 1

    def call() -> Any:
        outer = _BATCH.set(batch)
        try:
            return inside(*args, **(kwargs or {}))
        finally:
            _BATCH.reset(outer)

    return call


def batch_within() -> int:
    """Number of sequences in the opened function that is running, whichever mode opened it: heads are folded
    into them there. 0 where none is running."""
    return _BATCH.get()


def _nobody(_: object) -> bool:
    return False
