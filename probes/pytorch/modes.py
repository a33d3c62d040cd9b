"""Training and evaluation mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

if TYPE_CHECKING:
    from torch import nn


def training_note(source: str, model: nn.Module) -> tuple[str, ...]:
    """What to say of a module that would do something else if it were run as it is."""
    acting = [
        type(module).__name__
        for module in model.modules()
        if module.training
        and (isinstance(module, _BatchNorm) or (isinstance(module, _DropoutNd) and module.p > 0))
    ]
    if not acting:
        return ()
    return (
        f"{source}: in training mode ({', '.join(dict.fromkeys(acting))}); it was run in evaluation mode",
    )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the duration; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
