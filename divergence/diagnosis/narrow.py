"""Facts that narrow an error down where no cause explains it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from divergence.diagnosis import weights
from divergence.diagnosis.case import Case, Fit

if TYPE_CHECKING:
    from torch import Tensor

_MANY = 4


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
    found += [_cut_off(case), _own_weights(case)]
    axes = case.given.axes_of(case.at)
    for axis in ("token", "head", "channel"):
        if axis not in axes:
            continue
        over = tuple(i for i, name in enumerate(axes) if name != axis)
        part = error.square().sum(over).cpu().numpy()
        found.append(_spread(axis, part))
    return [f for f in found if f]


def _cut_off(case: Case) -> str:
    """That values beyond a limit were cut off: the candidate's extremes are taken many times."""
    seen, clean = case.candidate[case.tensor].double(), case.clean[case.tensor].double()
    low, high = float(seen.min()), float(seen.max())
    beyond = ((clean > high) & (seen == high)) | ((clean < low) & (seen == low))
    count = int(beyond.sum())
    return f"{count} values were cut off at {low:.4g} or {high:.4g}" if count >= _MANY else ""


def _own_weights(case: Case) -> str:
    """That the candidate's weights are the reference's, where it shows them all."""
    reaching = [name for name in weights.parameters(case) if name in case.trace.reaching(case.tensor)]
    if not reaching or not all(weights.is_untouched(case, name) for name in reaching):
        return ""
    return "the candidate holds the reference's weights: the error comes from what is done with them"


@dataclass(frozen=True)
class OtherWeights:
    """Weights of the candidate that are not the reference's, in no way that is known.

    Attributes:
        title: which, and how far off.
        evidence: what they explain, in words.
        explained: share of the error that they explain.
        fix: what to look at.
    """

    title: str
    evidence: str
    explained: float
    fix: str = (
        "export from the checkpoint that the reference loads: compare revisions and digests, and whether one "
        "was trained on, pruned or merged since"
    )


def other_weights(case: Case) -> OtherWeights | None:
    """The weights that the candidate itself shows to be others, where they explain more than half of the
    error. Looked for once in a case."""
    if "other weights" not in case.memory:
        case.memory["other weights"] = _other_weights(case)
    found: OtherWeights | None = case.memory["other weights"]
    return found


def _other_weights(case: Case) -> OtherWeights | None:
    named = weights.parameters(case)
    for names in weights.each_and_all(weights.touched(case)):
        held = weights.held(case, names)
        fit = _fit(case, held)
        if fit is None or not fit.convincing:
            continue
        off = sorted(_distance(named[name], own) for name, own in held.items())
        one = len(names) == 1
        words = weights.spelt(names)
        sizes = f"{off[0]:.3g}" + ("" if one else f" to {off[-1]:.3g}")
        return OtherWeights(
            f"{words} {'is' if one else 'are'} not the reference's (relative L2 {sizes}), in no way that is "
            "known",
            f"the candidate's own {words}, put into the reference, {'explains' if one else 'explain'} "
            f"{100 * fit.explained:.4g} % of the error",
            fit.explained,
        )
    return None


def _fit(case: Case, held: Mapping[str, Tensor]) -> Fit | None:
    """How well the candidate's own weights explain the error; None where a model's code cannot bear them."""
    with contextlib.suppress(Exception):
        return case.fit(weights.in_place(held))
    return None


def _distance(reference: Tensor, own: Tensor) -> float:
    wide = reference.detach().double()
    return float((own.double() - wide).norm() / wide.norm().clamp(min=1e-30))


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
