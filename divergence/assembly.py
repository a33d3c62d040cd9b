"""Puts the figures of the stages together into the frozen facts of a report."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from divergence.alignment import Pair
from divergence.captures import Capture
from divergence.noise import Floor
from divergence.result import SiteResult
from divergence.verdict import Judgement

if TYPE_CHECKING:
    import torch

    from divergence.comparison.metrics import Metrics
    from divergence.introduced import Introduced


def site_result(
    pair: Pair,
    reference: Capture,
    candidate: Capture,
    m: Metrics,
    floor: Floor | None,
    introduced: Introduced | None,
    judged: Judgement,
) -> SiteResult:
    """What a report says of the site that `pair` compares; arguments as the stages gave them."""
    site = pair.reference
    ref, cand = reference.entries[site], candidate.entries[pair.candidate]
    return SiteResult(
        site=str(site),
        stack=site.stack,
        layer=site.layer,
        tensor=site.tensor,
        call=site.call,
        verdict=judged.verdict,
        reason=judged.reason,
        mse=m.mse,
        max_abs=m.max_abs,
        max_abs_at=m.max_abs_at,
        mean_abs=m.mean_abs,
        rel_l2=m.rel_l2,
        row_rel_l2=m.row_rel_l2,
        cosine=m.cosine,
        ref_min=m.ref_min,
        ref_max=m.ref_max,
        cand_min=m.cand_min,
        cand_max=m.cand_max,
        ref_nonfinite=m.ref_nonfinite,
        cand_nonfinite=m.cand_nonfinite,
        floor=floor.rel_l2 if floor else None,
        ratio=floor.ratio(m) if floor else None,
        introduced=introduced.metrics.rel_l2 if introduced else None,
        introduced_floor=introduced.floor.rel_l2 if introduced else None,
        introduced_ratio=introduced.ratio if introduced else None,
        bit_equal=m.bit_equal,
        padded_max_abs=m.padded_max_abs,
        ref_dtype=ref.dtype,
        cand_dtype=cand.dtype,
        shape=ref.shape,
        layout=str(pair.layout),
        found_ref=ref.found,
        found_cand=cand.found,
        profile=m.profile(),
    )


def environment(reference: Capture, candidate: Capture, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What ran, on what and with what: JSON values only."""
    import torch

    from divergence import __version__

    ref, cand = reference.facts, candidate.facts
    return {
        "divergence": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "inputs_digest": reference.inputs_digest,
        **({"inputs": {name: f"{t.dtype}{list(t.shape)}" for name, t in inputs.items()}} if inputs else {}),
        "reference": {"model_digest": ref.model_digest, "versions": dict(ref.versions), **ref.details},
        "candidate": {
            "model_digest": cand.model_digest,
            "versions": dict(cand.versions),
            # The contract has a place of its own in the report.
            **{name: fact for name, fact in cand.details.items() if name != "contract"},
        },
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
