"""Comparisons to render: one of each verdict, and what a report must not stumble over."""

from __future__ import annotations

import dataclasses
import gzip
import math
from pathlib import Path
from typing import Any

from divergence.result import (
    Cause,
    Comparison,
    FirstDivergence,
    Policy,
    Profile,
    SiteResult,
    Unmatched,
)
from divergence.sites import LAYER_TENSORS, Site

FLOOR = 2e-4
EVIL = "<img src=x onerror=alert(1)>"
HEADS, TOKENS, CHANNELS = 4, 970, 64
KEY_VALUE = ("key", "value")
ALL = (*KEY_VALUE, "hidden")
COMMAND = "divergence compare --ref pytorch --cand engine.plan --inputs prompt.npz --out report"


def profile(error: float, layer: int, *, grows: bool) -> Profile:
    """A profile whose error is `error` all over, or grows with the token's position."""

    def at(n: int, i: int) -> float:
        wave = 1 + 0.3 * math.sin(1.7 * i + layer)
        return error * wave * (2 * i / n if grows else 1.0)

    return Profile(
        tuple(at(64, i) for i in range(64)),
        tuple(error * (1 + 0.2 * math.sin(3 * h + layer)) for h in range(HEADS)),
        tuple(error * math.exp(-i / 12) if grows else error for i in range(CHANNELS)),
    )


def site(layer: int | None, tensor: str, ratio: float | None = 1.1, **changes: Any) -> SiteResult:
    """A site whose error is `ratio` times its floor; it fails above 4."""
    error = None if ratio is None else ratio * FLOOR
    grows = tensor == "key" and ratio is not None and ratio > 4
    of_heads = tensor in ("key", "value", "query")
    values: dict[str, Any] = {
        "verdict": "fail" if ratio is not None and ratio > 4 else "pass",
        "mse": None if error is None else error**2,
        "max_abs": None if error is None else 31 * error,
        "max_abs_at": (0, 1, 900, 7) if of_heads else (0, 900, 7),
        "mean_abs": error,
        "rel_l2": error,
        "row_rel_l2": error,
        "cosine": None if error is None else 1 - error**2 / 2,
        "ref_min": -35.0 - (layer or 0),
        "ref_max": 40.0 + (layer or 0),
        "cand_min": -35.01 - (layer or 0),
        "cand_max": 40.02 + (layer or 0),
        "floor": FLOOR,
        "ratio": ratio,
        "ref_dtype": "float32",
        "cand_dtype": "float16",
        "shape": (1, HEADS, TOKENS, CHANNELS) if of_heads else (1, TOKENS, 2048),
        "found_ref": "cache",
        "found_cand": f"output {tensor}_{layer}",
        "profile": profile(error or 0.0, layer or 0, grows=grows),
    }
    stack, call = changes.pop("stack", ""), changes.pop("call", 1)
    name = str(Site(layer, tensor, stack, call))
    return SiteResult(name, stack, layer, tensor, call, **{**values, **changes})


def comparison(*sites: SiteResult, **changes: Any) -> Comparison:
    failing = next((s for s in sites if s.verdict == "fail"), None)
    values: dict[str, Any] = {
        "verdict": "fail" if failing else "pass",
        "reason": "in a word",
        "first_divergence": failing
        and FirstDivergence(failing.site, failing.stack, failing.layer, failing.tensor),
        "reference": "pytorch",
        "candidate": "engine.plan",
        "policy": Policy("noise-floor", 4.0, "fp16", "read from the candidate", "the reference run in fp16"),
        "environment": {"divergence": "0.1.0", "reference": {"versions": {"torch": "2.9.0"}}, "seconds": 3.2},
        "command": COMMAND,
    }
    return Comparison(sites=sites, **{**values, **changes})


def layers(count: int, tensors: tuple[str, ...] = ALL, **changes: Any) -> list[SiteResult]:
    return [site(n, t, 1.0 + n / count, **changes) for n in range(count) for t in tensors]


def passes(count: int = 30) -> Comparison:
    return comparison(*layers(count), site(None, "logits"), reason="all sites are within their limits")


CAUSE = Cause(
    "rope_precision",
    "The rotary angles are computed in half precision",
    (
        "the error of the key grows with the position of the token: 6.0e-4 at 1, 5.4e-2 at 900",
        "the value, which takes the same path but for the rotation, is at 1.2 times its floor",
    ),
    0.9996,
    "Build a strongly typed network and keep position, inv_freq, cos and sin in fp32.",
)
OTHER = Cause(
    "accumulation_precision", "Products are summed in fp16", ("tactics read f16f16",), 0.04, "Use bf16."
)
IGNORED = "softmax of 18 layers asked for Float, ran as Half inside _gemm_mha_v2"
CONTRACT = {
    "requested": "fp16",
    "engine_layers": 412,
    "rows": [
        {"module": "model.rotary_emb", "role": "rotary", "layers": "", "ran": "Half", "kernels": ["kgen"]},
        {
            "module": "model.layers.*.attn",
            "role": "softmax",
            "layers": "0-17",
            "ran": "Half",
            "kernels": ["mha"],
        },
    ],
    "ignored": [{"sentence": IGNORED, "layers": "0-17"}],
    "remarks": ["TF32 was on"],
    "nodes": [{"name": f"node_{n}", "op": "MatMul", "ran": "Half"} for n in range(400)],
}


def fails(count: int = 30, tensors: tuple[str, ...] = ALL) -> Comparison:
    """The key of every layer is off by its position; what follows only passes it on."""

    def one(n: int, tensor: str) -> SiteResult:
        if tensor == "key":
            return site(
                n, "key", 55.0 + n, introduced=55 * FLOOR, introduced_floor=FLOOR, introduced_ratio=55.0
            )
        carried = n > 0 or tensor == "hidden"
        return dataclasses.replace(
            site(n, tensor, 8.0 + n if carried else 1.2, verdict="pass"),
            introduced=FLOOR * 1.2,
            introduced_floor=FLOOR,
            introduced_ratio=1.2,
            reason="propagated: 9x the floor comes from earlier layers" if carried else "",
        )

    sites = [one(n, tensor) for n in range(count) for tensor in tensors]
    policy = Policy(
        "noise-floor", 4.0, "fp16", "read from the candidate", "the reference run in fp16", "introduced"
    )
    return comparison(
        *sites,
        site(None, "logits"),
        policy=policy,
        causes=(CAUSE, OTHER),
        contract=CONTRACT,
        notes=("TF32 was on.",),
        unmatched=(Unmatched("output.aux", "excluded", "by 'output.aux'"),),
    )


def error() -> Comparison:
    return comparison(
        verdict="error",
        reason="no site could be compared",
        unmatched=(Unmatched("layers.0.key", "missing in candidate", "no output of that name", "map it"),),
    )


def nonfinite(count: int = 12) -> Comparison:
    """NaN from layer 5 on; the profiles have none left."""
    sites = []
    for s in layers(count):
        broken = s.layer is not None and (s.layer > 5 or (s.layer == 5 and s.tensor == "hidden"))
        sites.append(
            dataclasses.replace(
                s, verdict="fail", cand_nonfinite=1024, rel_l2=None, row_rel_l2=None, ratio=None, mse=None,
                cosine=None, max_abs=None, max_abs_at=None, mean_abs=None, cand_min=None, cand_max=None,
                profile=Profile(token=(math.nan,) * 64), reason="1024 of 4096 values are NaN or Inf where",
            )
            if broken
            else s
        )  # fmt: skip
    return comparison(*sites)


def keys_and_values_only() -> Comparison:
    """An opaque engine: no hidden states, so that nothing was replayed."""
    known: dict[str, Any] = {"introduced": None, "introduced_ratio": None, "introduced_floor": None}
    sites = [
        dataclasses.replace(s, **known, verdict="fail" if (s.ratio or 0) > 4 else "pass", reason="")
        for s in fails(18, KEY_VALUE).sites
        if s.layer is not None
    ]
    return comparison(*sites, causes=(CAUSE,), notes=("the candidate gives no hidden states",))


def evil() -> Comparison:
    """Everything that a model can name is called `EVIL`."""
    bad = dataclasses.replace(
        site(0, "key", 50.0), site=f"layers.0.{EVIL}", tensor=EVIL, found_ref=EVIL, found_cand=EVIL,
        layout=EVIL, reason=EVIL, ref_dtype=EVIL,
    )  # fmt: skip
    return comparison(
        bad,
        dataclasses.replace(site(None, EVIL), site=f"output.{EVIL}"),
        first_divergence=FirstDivergence(bad.site, EVIL, 0, EVIL),
        reason=EVIL,
        reference=EVIL,
        candidate=f"{EVIL}</title></script>",
        causes=(Cause(EVIL, EVIL, (EVIL,), 0.9, EVIL),),
        notes=(EVIL,),
        contract={EVIL: [{EVIL: EVIL}], "a": EVIL, "b": [EVIL]},
        environment={EVIL: EVIL, "c": {EVIL: "</script><script>alert(1)</script>"}},
        unmatched=(Unmatched(EVIL, "missing in candidate", EVIL, EVIL), Unmatched(EVIL, "excluded", EVIL)),
        command=f"{EVIL}<!--<script>",
        policy=Policy("noise-floor", 4.0, EVIL, EVIL, EVIL, sites={EVIL: {"cosine": 0.9}}),
    )


def several_stacks() -> Comparison:
    return comparison(
        *layers(27, stack="vision"),
        *(s for call in (1, 2, 3) for s in layers(18, stack="expert", call=call)),
    )


def detailed(count: int = 80) -> Comparison:
    return dataclasses.replace(fails(count, LAYER_TENSORS), causes=(CAUSE,))


def recorded() -> Comparison:
    """SmolLM2-135M against an export whose rotary angles are in bfloat16: a recorded `report.json`."""
    packed = Path(__file__).parent / "data" / "smollm2-rotary-bf16.json.gz"
    return Comparison.from_json(gzip.decompress(packed.read_bytes()).decode())


CASES = {
    "pass": passes(),
    "fail": fails(),
    "error": error(),
    "nan": nonfinite(),
    "key-value": keys_and_values_only(),
    "evil": evil(),
    "stacks": several_stacks(),
    "outputs": comparison(site(None, "logits", 9.0), site(None, "action")),
    "one-layer": comparison(*layers(1)),
    "equal": comparison(*(dataclasses.replace(s, bit_equal=True, rel_l2=0.0, ratio=None) for s in layers(4))),
}
