"""The memory that a command may fill with tensors."""

from __future__ import annotations

import threading


class Budget:
    """Host memory that a command may fill with tensors.

    Half of it is for captures that stay in memory. The other half is for what is under way: page-locked
    buffers, the tensors that an ONNX model shows in one run, what is read ahead of a comparison.

    Args:
        memory: bytes.

    Attributes:
        under_way: bytes for what is under way.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.under_way = max(1, memory // 2)
        self._left = memory - memory // 2
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> bool:
        """Takes room for a tensor that stays in memory. Returns whether there was any."""
        with self._lock:
            if nbytes > self._left:
                return False
            self._left -= nbytes
            return True

    def give(self, nbytes: int) -> None:
        """Gives back what was taken."""
        with self._lock:
            self._left += nbytes
