"""The result of a chain of candidates: a `Comparison` for each, and what every step changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from divergence.errors import SourceError, StorageError, one_line
from divergence.pairs_result import INDEX, Pairs
from divergence.result import NESTED, SCHEMA, Comparison, Verdict, as_plain, from_plain, report_text


@dataclass(frozen=True)
class Difference:
    """A candidate against the one before it, at one site. Figures are None where they do not exist.

    Attributes:
        site: the address, by the reference's name.
        rel_l2: relative L2 error, of the tensor of the one before.
        row_rel_l2: median over valid tokens of the same.
        max_abs: largest absolute difference, in units of the tensor.
        ratio: the worse of both relative errors over the noise floor of the candidate.
        bit_equal: both tensors have the same bits.
    """

    site: str
    rel_l2: float | None = None
    row_rel_l2: float | None = None
    max_abs: float | None = None
    ratio: float | None = None
    bit_equal: bool = False


@dataclass(frozen=True)
class Step:
    """What changed from one candidate to the next.

    Attributes:
        from_: label of the one before; of the reference in the first step. `from` in `report.json`.
        to: label of the candidate.
        verdict: `fail` where the step brought an error in, `error` where that cannot be told.
        sentence: what the step did, in words.
        site: the first site at which it brought an error in, in execution order.
        bit_equal: all tensors that both have are equal to the bit.
        rel_l2: largest relative L2 difference between the two.
        rel_l2_at: the site of it.
        differences: between the two, by site in execution order.
    """

    from_: str
    to: str
    verdict: Verdict
    sentence: str
    site: str | None = None
    bit_equal: bool = False
    rel_l2: float | None = None
    rel_l2_at: str | None = None
    differences: tuple[Difference, ...] = ()


@dataclass(frozen=True)
class Chain:
    """Candidates in the order in which each was made from the one before.

    Attributes:
        verdict: `error` if a candidate could not be compared, else `fail` if one fails, else `pass`.
        reason: why; where it is not `pass`, the site of every step that brought an error in.
        reference: the reference's source.
        names: short labels of the candidates, each different.
        comparisons: every candidate against the reference, in the order of `names`. One that could
            not be compared has the verdict `error`, the message as its reason, and no sites.
        steps: every candidate against the one before it that could be compared.
        environment: facts of the whole run; those of a candidate are in its comparison.
        command: what the user ran.
    """

    verdict: Verdict
    reason: str
    reference: str
    names: tuple[str, ...]
    steps: tuple[Step, ...]
    comparisons: tuple[Comparison, ...]
    environment: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    kind: Literal["chain"] = "chain"
    schema: int = SCHEMA

    def __getitem__(self, name: str) -> Comparison:
        """The comparison of the candidate called `name`.

        Raises:
            KeyError: there is no such candidate.
        """
        if name not in self.names:
            raise KeyError(name)
        return self.comparisons[self.names.index(name)]

    @property
    def culprit(self) -> Step | None:
        """The first step that brought an error in, or None."""
        return next((step for step in self.steps if step.verdict == "fail"), None)

    def to_json(self) -> str:
        """`report.json`: strict JSON, as of `Comparison.to_json`."""
        content = as_plain(self)
        head = {key: content.pop(key) for key in ("schema", "kind")}
        return json.dumps({**head, **content}, indent=1, allow_nan=False)

    def save(self, path: Path) -> None:
        """Writes `report.json` at `path`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, text: str, where: str = "report.json") -> Self:
        """Reads `report.json` back.

        Raises:
            SourceError: not the report of a chain, or one of another schema.
        """
        try:
            content = json.loads(text)
            schema = content["schema"]
            if schema != SCHEMA:
                raise SourceError(
                    f"{where}: report schema {schema}, this version reads {SCHEMA}; run compare again"
                )
            if content.get("kind") != "chain":
                raise SourceError(
                    f"{where}: not the report of a chain; read it with divergence.Comparison.from_json"
                )
            return from_plain(cls, content, _NESTED)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(f"{where}: not a report of divergence ({one_line(error)})") from error


_NESTED = {**NESTED, "steps": Step, "comparisons": Comparison, "differences": Difference}


def load_any(path: str | Path) -> Comparison | Chain | Pairs:
    """The report in the folder or file `path`, which may be a URL: of one candidate, a chain or pairs.

    Raises:
        SourceError: there is none, or it cannot be read.
        StorageError: the URL cannot be read.
    """
    try:
        text, where = report_text(path)
    except (SourceError, StorageError) as missing:
        try:
            report_text(path, INDEX)
        except (SourceError, StorageError):
            raise missing from None
        return Pairs.load(path)
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind == "pairs":
        return Pairs.load(path)
    return Chain.from_json(text, where) if kind == "chain" else Comparison.from_json(text, where)
