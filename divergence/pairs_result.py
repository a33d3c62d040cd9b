"""The result of many pairs: a `Comparison` for every candidate on every sample of inputs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from divergence.errors import SourceError, one_line
from divergence.result import SCHEMA, Comparison, Verdict, load_report, report_text
from divergence.verdict import of_several

INDEX = "index.json"


@dataclass(frozen=True)
class PairResult:
    """One candidate on one sample, against the reference on that sample.

    Attributes:
        candidate, sample: short labels.
        comparison: where the question could not be answered, its verdict is `error`, its reason says why,
            and it has no sites.
        folder: name of the folder of its reports, beside the index.
    """

    candidate: str
    sample: str
    comparison: Comparison
    folder: str

    @property
    def name(self) -> str:
        """`CANDIDATE on SAMPLE`."""
        return f"{self.candidate} on {self.sample}"


@dataclass(frozen=True)
class Pairs:
    """All pairs of several candidates and several samples.

    Attributes:
        verdict: `error` if a pair could not be answered, else `fail` if one fails, else `pass`.
        reason: how many.
        reference: the reference's source.
        pairs: one for every candidate on every sample, by sample and then by candidate.
        environment: facts of the whole run; those of a pair are in its comparison.
        command: what the user ran.
    """

    verdict: Verdict
    reason: str
    reference: str
    pairs: tuple[PairResult, ...]
    environment: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    kind: Literal["pairs"] = "pairs"
    schema: int = SCHEMA

    @property
    def candidates(self) -> tuple[str, ...]:
        """Labels of the candidates."""
        return tuple(dict.fromkeys(pair.candidate for pair in self.pairs))

    @property
    def samples(self) -> tuple[str, ...]:
        """Labels of the samples."""
        return tuple(dict.fromkeys(pair.sample for pair in self.pairs))

    def __getitem__(self, key: tuple[str, str]) -> Comparison:
        """The comparison of a candidate on a sample: `pairs["model.onnx", "short.npz"]`.

        Raises:
            KeyError: there is no such pair.
        """
        for pair in self.pairs:
            if (pair.candidate, pair.sample) == key:
                return pair.comparison
        raise KeyError(key)

    @classmethod
    def of(
        cls,
        pairs: Iterable[PairResult],
        reference: str,
        environment: Mapping[str, Any],
        command: str = "",
    ) -> Self:
        """All of `pairs`, with the verdict that they have together."""
        found = tuple(pairs)
        verdict, reason = of_several([pair.comparison.verdict for pair in found], "pair")
        return cls(verdict, reason, reference, found, environment, command)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads the `index.json` of a folder or URL, and the report of every pair beside it.

        Raises:
            SourceError: there is no such index, or a report cannot be read.
            StorageError: the URL cannot be read.
        """
        text, where = report_text(folder, INDEX)
        try:
            content = json.loads(text)
            if content["kind"] != "pairs":
                raise SourceError(f"{where}: the index of a {content['kind']}; give the folder of one report")
            if content["schema"] != SCHEMA:
                raise SourceError(
                    f"{where}: index schema {content['schema']}, this version reads {SCHEMA}; compare again"
                )
            base = where.removesuffix(INDEX)
            entries = sorted(content["comparisons"], key=lambda entry: int(entry["number"]))
            for entry in entries:
                if Path(entry["folder"]).name != entry["folder"]:
                    raise SourceError(
                        f"{where}: '{entry['folder']}' is no folder beside it; run compare again"
                    )
            return cls.of(
                [
                    PairResult(e["name"], e["sample"], load_report(f"{base}{e['folder']}"), e["folder"])
                    for e in entries
                ],
                content["reference"],
                content["environment"],
                content["command"],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(f"{where}: not an index of divergence ({one_line(error)})") from error
