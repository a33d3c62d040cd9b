"""Sees what reaches the attention product, without touching it.

`AttentionWatch` is a torch function mode: it sees calls of `scaled_dot_product_attention`, and in
explicit attention the product before a softmax (query times key) and the one after it
(probabilities times value), also where the softmax is written out. Functions that hide these are opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from divergence.probes.pytorch.opened import batch_within, opened

_MATMULS = frozenset(
    {torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, torch.einsum, torch.baddbmm}
)
_SOFTMAX = frozenset({torch.softmax, functional.softmax, Tensor.softmax, torch.special.softmax})
_EXPONENTIALS = frozenset(
    {torch.exp, torch.exp_, Tensor.exp, Tensor.exp_, torch.exp2, Tensor.exp2, Tensor.exp2_}
)
_WATCHED = _MATMULS | _SOFTMAX | _EXPONENTIALS | {functional.scaled_dot_product_attention}
_EINSUM = re.compile(r"^([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]+)$")


@dataclass
class Product:
    """One attention product as it was seen.

    Attributes:
        query, key, value: `[batch, head, token, channel]`; key and value with the heads repeated
            where the model repeats them before the product.
        how: in words.
        batch: number of sequences, where heads may be folded into them and this is known; else 0.
        by_hand: whether its softmax is written out.
    """

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    how: str
    batch: int = 0
    by_hand: bool = False


class AttentionWatch(TorchFunctionMode):
    """Reports every attention product to `seen` while active.

    Args:
        seen: called with each product; an explicit product is reported when its value is known.
    """

    def __init__(self, seen: Callable[[Product], None]) -> None:
        super().__init__()
        self._seen = seen
        # Products of the current module call that may turn out to be scores, newest last.
        self._scores: list[tuple[torch.Size, Tensor, Tensor]] = []
        self._pending: tuple[torch.Size, Tensor, Tensor, bool] | None = None

    def forget(self) -> None:
        """Drops what was seen so far (a layer begins or ends)."""
        self._scores.clear()
        self._pending = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        inside = opened(func, types, args, kwargs)
        if inside is not None:
            with self:
                return inside()
        result = func(*args, **kwargs) if kwargs else func(*args)
        if func in _WATCHED:  # few are, and every call of the model passes here
            kwargs = kwargs or {}
            if func is functional.scaled_dot_product_attention:
                self._sdpa(args, kwargs)
            elif func in _MATMULS:
                self._matmul(func, args, kwargs, result)
            elif isinstance(result, Tensor) and result.dim() >= 3:
                self._softmax(result, by_hand=func in _EXPONENTIALS)
        return result

    def _sdpa(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        named = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
        how = "what reaches scaled_dot_product_attention"
        self._seen(Product(named["query"], named["key"], named["value"], how, batch_within()))

    def _matmul(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        operands = _operands(func, args, kwargs)
        if operands is None or not isinstance(result, Tensor):
            return
        left, right = operands
        if self._pending is not None and _same_scores(left.shape, self._pending[0]):
            _, query, key, by_hand = self._pending
            self._pending = None
            how = "what reaches the attention product"
            self._seen(Product(query, key, right, how, batch_within(), by_hand))
            return
        self._scores.append((result.shape, left, right.transpose(-1, -2)))
        del self._scores[:-4]

    def _softmax(self, result: Tensor, *, by_hand: bool) -> None:
        for shape, query, key in reversed(self._scores):
            if _same_scores(shape, result.shape):
                self._pending = (result.shape, query, key, by_hand)
                self._scores.clear()
                return


def _same_scores(product: torch.Size, softmax: torch.Size) -> bool:
    """A bmm over folded heads `[batch * head, q, k]` may reach softmax as `[batch, head, q, k]`, and one of a
    group's queries in one axis, `[batch, head, group * q, k]`, as `[batch, head, group, q, k]`."""
    return product[-1:] == softmax[-1:] and product.numel() == softmax.numel()


def _operands(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Left and right operand of a batched product, as `[..., rows, inner]` and `[..., inner, columns]`."""
    if func is torch.einsum:
        return _einsum_operands(args)
    if func is torch.baddbmm:
        args = args[1:]
    values = [*args, *kwargs.values()]
    if len(values) < 2 or not all(isinstance(v, Tensor) for v in values[:2]):
        return None
    left, right = values[0], values[1]
    if left.dim() < 3 or right.dim() < 3:
        return None
    return left, right


def _einsum_operands(args: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
    """Brings `bhqd,bhkd->bhqk` and `bhqk,bhkd->bhqd` (any letters, any axis order) to matmul form."""
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    match = _EINSUM.match(args[0].replace(" ", "")) if isinstance(args[0], str) else None
    if match is None or len(operands) != 2 or not all(isinstance(x, Tensor) for x in operands):
        return None
    left, right, out = match.groups()
    inner = [c for c in left if c in right and c not in out]
    rows = [c for c in left if c not in right]
    columns = [c for c in right if c not in left]
    if not (len(inner) == len(columns) == 1 and rows):  # several rows: a group of queries for each key
        return None
    batch = "".join(c for c in left if c in right and c in out)
    a = torch.einsum(f"{left}->{batch}{''.join(rows)}{inner[0]}", operands[0])
    b = torch.einsum(f"{right}->{batch}{inner[0]}{columns[0]}", operands[1])
    return (a, b) if a.dim() >= 3 else None


def unrepeat(tensor: Tensor) -> tuple[Tensor, int]:
    """Undoes the repetition of key-value heads: `[batch, head, token, channel]` in which every
    `g` neighbouring heads are equal becomes `[batch, head / g, token, channel]`.

    Returns:
        The tensor (a view) and the largest such `g`.
    """
    heads = tensor.shape[1]
    if heads == 1 or tensor.stride(1) == 0:
        return tensor[:, :1], heads  # one head in memory: nothing to ask the device for
    if tensor.device.type == "cpu" and not all(_like_next(tensor[:, :2])):
        return tensor, 1  # nearly always decides, and costs no wait here
    equal = _like_next(tensor)
    for group in range(heads, 1, -1):
        if heads % group == 0 and all(equal[i] for i in range(heads - 1) if (i + 1) % group):
            return tensor[:, ::group], group
    return tensor, 1


def _like_next(tensor: Tensor) -> list[bool]:
    """For each head but the last whether it equals the next; NaN equals NaN, for padded tokens may hold it.
    All are asked for at once: every answer that a device is waited for holds up the model."""
    a, b = tensor[:, :-1], tensor[:, 1:]
    answers: list[bool] = ((a == b) | ((a != a) & (b != b))).all(-1).all(-1).all(0).tolist()
    return answers
