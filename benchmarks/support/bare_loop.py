"""One pass over two tensors and nothing else: what a loop that is compiled with numba takes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numba
import numpy as np
import torch


@numba.njit(nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _seven_figures(ref: Any, cand: Any) -> Any:
    """Sums of squares of both and of the error, of the products and of |error|, the largest error, and how
    many values are not finite, in float64."""
    squared, squared_ref, squared_cand, product, absolute, largest, bad = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0
    for i in range(ref.size):
        r, c = np.float64(ref[i]), np.float64(cand[i])
        error = abs(c - r)
        squared += error * error
        squared_ref += r * r
        squared_cand += c * c
        product += r * c
        absolute += error
        largest = max(largest, error)
        bad += not error < np.inf
    return squared, squared_ref, squared_cand, product, absolute, largest, bad


def bare(ref: torch.Tensor, cand: torch.Tensor) -> Callable[[], Any]:
    """The loop over two contiguous float32 tensors, by torch's number of threads."""
    threads = torch.get_num_threads()
    parts = [
        (one.numpy(), other.numpy())
        for one, other in zip(ref.view(-1).chunk(threads), cand.view(-1).chunk(threads), strict=True)
    ]
    pool = ThreadPoolExecutor(threads)
    _seven_figures(*(side[:1] for side in parts[0]))

    def run() -> None:
        for done in [pool.submit(partial(_seven_figures, *part)) for part in parts]:
            done.result()

    return run
