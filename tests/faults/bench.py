"""The fault benchmark: every pair compared, and what was said of it held against what is true.

    python -m tests.faults.bench [--seed 0 [1 2 ...]] [--only TEXT] [--write]

prints the table; `--write` puts it into docs/fault-benchmark.md.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import divergence
from divergence.config import Config
from divergence.result import Comparison
from tests.faults import catalogue, ported, ready
from tests.faults.pairs import Case, Pair
from tests.faults.planting import Planted

PAIRS: tuple[Pair, ...] = (*catalogue.PAIRS, *ready.PAIRS, *ported.PAIRS)
DOCUMENT = Path(__file__).parents[2] / "docs" / "fault-benchmark.md"


@dataclass(frozen=True)
class Row:
    """What was said of one pair.

    Attributes:
        pair, seed: which.
        truth: what was planted.
        verdict, site: the answer; `site` is None where nothing diverges.
        causes: id by site, the best of each site.
        explained: by the best cause of the first site.
        reason: of the verdict.
        seconds: that the comparison took.
    """

    pair: str
    seed: int
    truth: tuple[Planted, ...]
    verdict: str
    site: str | None
    causes: dict[str, str]
    explained: float | None
    reason: str
    seconds: float

    @property
    def verdict_right(self) -> bool:
        """Fail where something was planted, else pass."""
        return self.verdict == ("fail" if self.truth else "pass")

    @property
    def site_right(self) -> bool:
        """Layer and tensor of the first divergence, or none where nothing was planted."""
        return self.site == (self.truth[0].site if self.truth else None)

    @property
    def cause_right(self) -> bool:
        """Every fault is named at its site, and nothing is named where nothing was planted."""
        if not self.truth:
            return not self.causes
        return all(self.causes.get(planted.site) == planted.cause for planted in self.truth)


def judged(case: Case, *, diagnose: bool = True) -> Comparison:
    """Compares a case, with no configuration file."""
    return divergence.compare(
        case.reference, case.candidate, case.inputs, config=Config(), diagnose=diagnose, **case.options
    )


def run(pair: Pair, seed: int = 0, *, diagnose: bool = True) -> Row:
    """Builds and compares one pair."""
    case = pair.build(seed)
    started = time.perf_counter()
    result = judged(case, diagnose=diagnose)
    seconds = time.perf_counter() - started
    first = result.first_divergence.site if result.first_divergence else None
    causes: dict[str, str] = {}
    for cause in result.causes:
        causes.setdefault(cause.site or first or "", cause.id)
    explained = next((c.explained for c in result.causes if (c.site or first) == first), None)
    return Row(pair.name, seed, case.truth, result.verdict, first, causes, explained, result.reason, seconds)


def _mark(right: bool) -> str:
    return "yes" if right else "**no**"


def table(rows: Iterable[Row]) -> str:
    """One line for each pair, in Markdown."""
    lines = [
        "| pair | planted | at | verdict | site | cause | explained | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        planted = ", ".join(p.cause for p in row.truth) or "nothing"
        at = ", ".join(p.site for p in row.truth)
        named = _mark(row.cause_right)
        if not row.cause_right:
            named += " " + (", ".join(dict.fromkeys(row.causes.values())) or "none named")
        explained = "" if row.explained is None else f"{row.explained:.4f}"
        site = _mark(row.site_right) + ("" if row.site_right else f" {row.site}")
        lines.append(
            f"| {row.pair} | {planted} | {at} | {_mark(row.verdict_right)} | {site} | {named} "
            f"| {explained} | {row.seconds:.2f} |"
        )
    return "\n".join(lines)


def _share(rights: Sequence[bool]) -> str:
    return f"{sum(rights)} of {len(rights)} ({100 * sum(rights) / len(rights):.1f} %)" if rights else "none"


def summary(rows: Sequence[Row]) -> str:
    """The totals, and the causes one by one, in Markdown."""
    planted = [row for row in rows if row.truth]
    clean = [row for row in rows if not row.truth]
    lines = [
        "| | right |",
        "|---|---|",
        f"| verdict, of all pairs | {_share([r.verdict_right for r in rows])} |",
        f"| passes, of the clean pairs | {_share([r.verdict_right for r in clean])} |",
        f"| first layer and tensor, of the faulty pairs | {_share([r.site_right for r in planted])} |",
        f"| cause, of the faulty pairs | {_share([r.cause_right for r in planted])} |",
        "",
        "| cause | pairs | named |",
        "|---|---|---|",
    ]
    by_cause: dict[str, list[bool]] = defaultdict(list)
    for row in planted:
        for fault in row.truth:
            by_cause[fault.cause].append(row.causes.get(fault.site) == fault.cause)
    lines += [f"| `{cause}` | {len(found)} | {sum(found)} |" for cause, found in sorted(by_cause.items())]
    return "\n".join(lines)


def document(rows: Sequence[Row]) -> str:
    """docs/fault-benchmark.md."""
    return f"""# The fault benchmark

{len(rows)} pairs of a reference and a candidate, made from seeds: a fault whose layer, tensor, cause and
parameters are known because it was planted, or none. The models are decoders of our own in the style of
Llama, Gemma and GPT-2 (`tests/faults/models.py`) and small ones from transformers (`ready.py`, `ported.py`);
`tests/faults/plant.py` has the faults, `tests/faults/catalogue.py` the pairs. A cause counts as named only if
it is the first of its site, and in a pair with two faults only if both are. `unknown` is the right answer to
noise. Written by `python -m tests.faults.bench --write`; torch {torch.__version__.split("+")[0]}, one thread.

What is found in engines whose faults nobody planted: [causes.md](causes.md#on-real-engines).

{summary(rows)}

## Pair by pair

{table(rows)}
"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compares every pair and prints the table.")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="0 is the one of the tests")
    parser.add_argument("--only", default="", help="pairs whose name holds this text")
    parser.add_argument("--write", action="store_true", help=f"write docs/{DOCUMENT.name}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = [pair for pair in PAIRS if given.only in pair.name]
    run(chosen[0])  # the first comparison of a process loads the frameworks
    rows = [run(pair, seed) for seed in given.seed for pair in chosen]
    print(table(rows))
    print()
    print(summary(rows))
    if given.write:
        DOCUMENT.write_text(document(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
