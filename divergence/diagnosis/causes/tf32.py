"""Products of fp32 operands rounded to TF32, which GPUs do unless told not to."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from divergence.diagnosis import products
from divergence.diagnosis.case import Case
from divergence.diagnosis.contract import ran_in
from divergence.diagnosis.hypotheses import Trial
from divergence.emulation import round_tf32

ID = "tf32"

_LARGEST = 50 * 2.0**-11  # of a relative error that operands of 11 significant bits make


def trials(case: Case) -> Iterator[Trial]:
    """Operands of the projections, then of all products, rounded to 10 mantissa bits or cut off there."""
    if case.given.precision in ("fp16", "bf16") or not case.is_noise or case.size > _LARGEST:
        return
    for words, indices in (
        ("projections", products.projections(case)),
        ("all products", products.all_products(case)),
    ):
        for how, rounding in (("rounded to", round_tf32), ("cut to", cut)):
            yield Trial(
                key=f"{words} {how}",
                title=f"products run in TF32: operands of {words} are {how} 10 mantissa bits",
                fault=products.computed(indices, products.rounded_operands(rounding)),
                parameters=lambda _, words=words, how=how: {"products": words, "operands": how},
                evidence=lambda case, _: ran_in(case.given.facts, "projection"),
                fix="clear TF32 (TensorRT: config.clear_flag(trt.BuilderFlag.TF32); PyTorch: "
                "torch.backends.cuda.matmul.allow_tf32 = False), or say --precision tf32 if it is meant",
            )


def cut(value: Tensor) -> Tensor:
    """Cuts fp32 off after 10 mantissa bits."""
    bits = value.float().contiguous().view(torch.int32) & ~0x1FFF
    return bits.view(torch.float32)
