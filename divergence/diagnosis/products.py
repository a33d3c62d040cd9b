"""Matrix products computed otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Fault
from divergence.diagnosis.trace import Call, Handler

_PROJECTIONS = ("linear", "addmm", "matmul")


@dataclass(frozen=True)
class Product:
    """A product as left `[..., rows, inner]` times right `[..., inner, columns]`, plus a bias."""

    left: Tensor
    right: Tensor
    bias: Tensor | None


Compute = Callable[[Product], Tensor]


def projections(case: Case, *, of_site: bool = True) -> list[int]:
    """Numbers of the products with a parameter, those that the site depends on or all."""
    return [
        o.index
        for o in case.trace.operators.values()
        if o.name in _PROJECTIONS
        and o.depends
        and not all(o.dependent)
        and (not of_site or case.trace.reaches(case.tensor, o.index))
    ]


def all_products(case: Case) -> list[int]:
    """Numbers of all products of activations that the site depends on."""
    return [
        o.index
        for o in case.trace.named(*_PROJECTIONS, "scaled_dot_product_attention")
        if case.trace.reaches(case.tensor, o.index)
    ]


def computed(indices: Sequence[int], compute: Compute) -> Fault:
    """The fault of products computed by `compute`."""
    handlers: dict[int, Handler] = dict.fromkeys(indices, lambda call: _computed(call, compute))
    return Fault(operators=lambda: handlers)


def _computed(call: Call, compute: Compute) -> Any:
    product = product_of(call)
    if product is None:
        return call.run()
    made = compute(product)
    return made if product.bias is None else made + product.bias


def product_of(call: Call) -> Product | None:
    """The product of a call, or None where it is written in another way."""
    name = getattr(call.func, "__name__", "").strip("_")
    if name == "linear":
        weight = call.argument(1, "weight")
        return Product(call.argument(0, "input"), weight.transpose(-1, -2), call.argument(2, "bias"))
    if name == "addmm":
        return Product(call.argument(1, "mat1"), call.argument(2, "mat2"), call.argument(0, "input"))
    if name in ("matmul", "bmm", "mm"):
        return Product(call.args[0], call.args[1] if len(call.args) > 1 else call.kwargs["other"], None)
    return None


def rounded_operands(rounding: Callable[[Tensor], Tensor]) -> Compute:
    """Products of rounded operands."""
    return lambda product: rounding(product.left) @ rounding(product.right)


def accumulated(dtype: torch.dtype, chunk: int) -> Compute:
    """Products whose running sum is rounded to `dtype` after every `chunk` terms."""

    def compute(product: Product) -> Tensor:
        left, right = product.left.float(), product.right.float()
        total: Tensor | None = None
        for start in range(0, left.shape[-1], chunk):
            term = left[..., start : start + chunk] @ right[..., start : start + chunk, :]
            total = (term if total is None else total.float() + term).to(dtype)
        assert total is not None
        return total.to(product.left.dtype)

    return compute
