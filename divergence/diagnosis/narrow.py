"""Facts that narrow an error down where no cause explains it."""

from __future__ import annotations

import numpy as np

from divergence.diagnosis.case import Case


def facts(case: Case) -> list[str]:
    """Sentences on where the error sits: tensors, tokens, heads, channels, gain."""
    found = []
    passing = [n for n in case.error if n not in case.failing and case.result_of(n) is not None]
    failing = ", ".join(case.failing)
    found.append(
        f"in this layer {failing} fail{'' if len(case.failing) > 1 else 's'}"
        + (f" and {', '.join(passing)} pass" if passing else "")
    )
    error, clean = case.error[case.tensor], case.valid_clean(case.tensor)
    size = float(clean.square().sum())
    if size > 0:
        gain = 1.0 + float((error * clean).sum()) / size
        found.append(f"the gain from reference to candidate that fits best is {gain:.5g}")
    axes = case.given.axes_of(case.at)
    for axis in ("token", "head", "channel"):
        if axis not in axes:
            continue
        over = tuple(i for i, name in enumerate(axes) if name != axis)
        part = error.square().sum(over).cpu().numpy()
        found.append(_spread(axis, part))
    return [f for f in found if f]


def _spread(axis: str, part: np.ndarray[tuple[int], np.dtype[np.float64]]) -> str:
    total = float(part.sum())
    if part.size < 2 or total == 0:
        return ""
    order = np.argsort(part)[::-1]
    reached = int(np.searchsorted(np.cumsum(part[order]) / total, 0.9)) + 1
    few = f"90 % of its energy sits in {reached} of {part.size} {axis}s"
    half = part.size // 2
    if axis == "token":
        late = float(part[half:].sum()) / total
        return f"{few}; {100 * late:.3g} % in the later half"
    return few if reached > 3 else f"{few} ({', '.join(str(int(i)) for i in sorted(order[:reached]))})"
