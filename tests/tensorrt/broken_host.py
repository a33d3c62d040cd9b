"""Hosts that forget to wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from divergence.probes.tensorrt.hosts import TorchHost


class UploadElsewhere(TorchHost):
    """Copies its inputs on another stream, and does not wait for it."""

    def __init__(self, load: Callable[[], Any]) -> None:
        super().__init__(load)
        self.upload_stream = torch.cuda.Stream()


class ReadTooEarly(TorchHost):
    """Reads its outputs without waiting for the engine."""

    def finish(self) -> None:
        pass
