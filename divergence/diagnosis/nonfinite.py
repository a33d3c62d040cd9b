"""Where NaN or Inf appeared first, and what is known of the place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from divergence.diagnosis.case import Case, Given
from divergence.sites import Site

if TYPE_CHECKING:
    from divergence.result import SiteResult

_LIMITS = {"float16": 65504.0, "bfloat16": 3.39e38, "float32": 3.4e38}


def has_lost(failing: Sequence[SiteResult]) -> bool:
    """Whether one of these sites fails by NaN or Inf."""
    return any(result.cand_nonfinite > result.ref_nonfinite for result in failing)


def origin(given: Given, failing: SiteResult) -> Site:
    """The first site in execution order at which the candidate holds NaN or Inf and the reference does
    not, padding included: a padded row of NaN reaches valid tokens a layer later."""
    for name in given.results:
        site = Site.parse(name)
        if name == failing.site:
            break
        seen, clean = given.candidate(site), given.reference(site)
        if seen is None or clean is None or seen.shape != clean.shape:
            continue
        if bool((~seen.isfinite() & clean.isfinite()).any()):
            return site
    return Site.parse(failing.site)


def facts(case: Case) -> Iterator[str]:
    """How many values of which kind, the range just before, and whether it was seen."""
    seen, clean = case.candidate[case.tensor], case.clean[case.tensor]
    nan, inf = int(seen.isnan().sum()), int(seen.isinf().sum())
    yield f"{case.at} is the first site that is not finite: {nan} NaN and {inf} Inf in {seen.numel()} values"
    mask = case.given.mask_of(case.at, seen)
    if mask is not None and case.result.cand_nonfinite <= case.result.ref_nonfinite:
        yield "all of them lie at padded tokens, whose keys and values later layers read"
    largest = float(clean.nan_to_num(0.0, 0.0, 0.0).abs().max())
    dtype = case.result.cand_dtype
    limit = _LIMITS.get(dtype)
    if limit is not None:
        yield f"the reference's values there reach {largest:.4g}; {dtype} ends at {limit:.4g}"
    hidden = getattr(case.unit, "hidden", None)
    if isinstance(hidden, torch.Tensor):
        yield f"the layer's input is finite and reaches {float(hidden.nan_to_num(0.0).abs().max()):.4g}"
    unseen: Mapping[str, str] = case.given.facts.unseen_inf
    if str(case.at) in unseen:
        yield f"no consumer saw it: {unseen[str(case.at)]}"
