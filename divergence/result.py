"""The result of a comparison: frozen facts that serialise to `report.json`.

Every report renders a `Comparison` and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from divergence.errors import SourceError, StorageError, nearest, one_line
from divergence.working import file_name

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1

T = TypeVar("T")

Verdict = Literal["pass", "fail", "error"]
State = Literal["matched", "missing in reference", "missing in candidate", "shape mismatch", "excluded"]


@dataclass(frozen=True)
class MetricInfo:
    """What a figure means: its unit and which direction is better."""

    label: str
    unit: str
    better: Literal["lower", "higher", "neither"]


METRICS: Mapping[str, MetricInfo] = {
    "mse": MetricInfo("mean squared error", "squared units of the tensor", "lower"),
    "max_abs": MetricInfo("largest absolute difference", "units of the tensor", "lower"),
    "mean_abs": MetricInfo("mean absolute difference", "units of the tensor", "lower"),
    "rel_l2": MetricInfo("L2 norm of the difference over L2 norm of the reference", "1", "lower"),
    "row_rel_l2": MetricInfo("median over valid tokens of the relative L2 error", "1", "lower"),
    "cosine": MetricInfo("cosine of the angle between the two tensors", "1", "higher"),
    "ratio": MetricInfo("error over noise floor", "1", "lower"),
    "introduced": MetricInfo("relative L2 error that this layer adds (replay)", "1", "lower"),
    "introduced_ratio": MetricInfo("introduced error over the noise floor of that layer", "1", "lower"),
}


@dataclass(frozen=True)
class Profile:
    """How the error is spread; relative L2 errors. At most 64 entries an axis: longer axes are
    binned, each bin being the relative L2 error over its members."""

    token: tuple[float, ...] = ()
    head: tuple[float, ...] = ()
    channel: tuple[float, ...] = ()


@dataclass(frozen=True)
class SiteResult:
    """One site of the comparison. Figures are None where they do not exist.

    Attributes:
        site, stack, layer, tensor, call: the address (`divergence.sites.Site`).
        mse, max_abs, mean_abs, rel_l2, row_rel_l2, cosine: see `METRICS`.
        max_abs_at: index of the largest difference, by axis of the reference's layout.
        ref_min, ref_max, cand_min, cand_max: ranges over finite values at valid tokens.
        ref_nonfinite, cand_nonfinite: numbers of NaN and Inf at valid tokens.
        floor: noise floor as relative L2 error (cumulative).
        ratio: cumulative error over its floor; worst of whole tensor, median token, median channel
            and nine of ten channels.
        introduced: relative L2 error that the layer adds to the candidate's own input to it.
        introduced_floor, introduced_ratio: the same layer's floor, and the ratio to it.
        bit_equal: both tensors have the same bits.
        padded_max_abs: largest difference at padded tokens, which count for nothing else.
        ref_dtype, cand_dtype, shape: of the tensors.
        layout: what was done to bring the candidate into the reference's layout; "" for nothing.
        found_ref, found_cand: how each probe found it.
        verdict: of this site.
        reason: why, where the verdict is not pass; a remark otherwise.
    """

    site: str
    stack: str
    layer: int | None
    tensor: str
    call: int
    verdict: Verdict
    reason: str = ""
    mse: float | None = None
    max_abs: float | None = None
    max_abs_at: tuple[int, ...] | None = None
    mean_abs: float | None = None
    rel_l2: float | None = None
    row_rel_l2: float | None = None
    cosine: float | None = None
    ref_min: float | None = None
    ref_max: float | None = None
    cand_min: float | None = None
    cand_max: float | None = None
    ref_nonfinite: int = 0
    cand_nonfinite: int = 0
    floor: float | None = None
    ratio: float | None = None
    introduced: float | None = None
    introduced_floor: float | None = None
    introduced_ratio: float | None = None
    bit_equal: bool = False
    padded_max_abs: float | None = None
    ref_dtype: str = ""
    cand_dtype: str = ""
    shape: tuple[int, ...] = ()
    layout: str = ""
    found_ref: str = ""
    found_cand: str = ""
    profile: Profile = field(default_factory=Profile)


@dataclass(frozen=True)
class Unmatched:
    """A site that was not compared, and why (`State`)."""

    site: str
    state: State
    reason: str
    suggestion: str = ""


@dataclass(frozen=True)
class FirstDivergence:
    """The first failing site in execution order."""

    site: str
    stack: str
    layer: int | None
    tensor: str


@dataclass(frozen=True)
class Cause:
    """A named explanation of the error that enters at a site.

    Attributes:
        id: one of `docs/causes.md`.
        title: what is wrong, in words.
        evidence: what speaks for it, a sentence with figures each.
        explained: 1 - |e - e_emulated|^2 / |e|^2 at `site`; None where nothing can be emulated.
        fix: the setting or the code to change.
        site: where the error enters; "" stands for the first divergence.
        parameters: what was estimated (gain, eps, offset, ...), and the `sites` it explains beside `site`.
    """

    id: str
    title: str
    evidence: tuple[str, ...]
    explained: float | None
    fix: str
    site: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Hypothesis:
    """A cause that was tried on the error that enters at a site.

    Attributes:
        site: where the error enters.
        id, title, explained, parameters, fix: as of `Cause`.
        evidence_for, evidence_against: what the figures say, a sentence each.
        overall: as `explained`, over all tensors of the layer, each in units of its noise floor.
    """

    site: str
    id: str
    title: str
    evidence_for: tuple[str, ...] = ()
    evidence_against: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    explained: float | None = None
    overall: float | None = None
    fix: str = ""


@dataclass(frozen=True)
class Policy:
    """What the verdict was judged by.

    Attributes:
        policy: `noise-floor` or `absolute`.
        ratio: limit of error over floor (noise-floor).
        precision: the precision in which the floor was taken, or "".
        precision_from: where that was read ("candidate", "--precision", ...).
        floor_from: how the floor was taken, in words.
        judged: `introduced` or `cumulative`: which error the ratio was taken of.
        sites: absolute limits by site pattern and metric.
    """

    policy: Literal["noise-floor", "absolute"]
    ratio: float
    precision: str = ""
    precision_from: str = ""
    floor_from: str = ""
    judged: Literal["introduced", "cumulative"] = "cumulative"
    sites: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Everything that is known after comparing a candidate with a reference.

    Two are equal where `report.json` says the same of both, which has no NaN that differs from itself.
    """

    verdict: Verdict
    reason: str
    first_divergence: FirstDivergence | None
    reference: str
    candidate: str
    policy: Policy
    sites: tuple[SiteResult, ...]
    unmatched: tuple[Unmatched, ...] = ()
    causes: tuple[Cause, ...] = ()
    diagnosis: tuple[Hypothesis, ...] = ()
    notes: tuple[str, ...] = ()
    contract: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    schema: int = SCHEMA

    def __eq__(self, other: object) -> bool:
        return as_plain(self) == as_plain(other) if isinstance(other, Comparison) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def unanswered(
        cls, reason: str, *, reference: str, candidate: str, policy: Policy, command: str = ""
    ) -> Self:
        """Of a question that could not be answered: the verdict is `error`, and there are no sites."""
        return cls("error", reason, None, reference, candidate, policy, (), command=command)

    def site(self, name: str) -> SiteResult:
        """The result of the site called `name`.

        Raises:
            KeyError: it was not compared.
        """
        for result in self.sites:
            if result.site == name:
                return result
        raise KeyError(f"{name}: no such site was compared{nearest(name, [r.site for r in self.sites])}")

    def to_frame(self) -> pd.DataFrame:
        """The sites as a table of pandas, with the columns that `divergence.frame.COLUMNS` documents."""
        from divergence.frame import to_frame

        return to_frame(self)

    def to_json(self) -> str:
        """`report.json`: strict JSON (NaN and infinities become null; counts say how many)."""
        return json.dumps(as_plain(self), indent=1, allow_nan=False, sort_keys=False)

    def save(self, path: Path) -> None:
        """Writes `report.json` at `path`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, text: str, where: str = "report.json") -> Self:
        """Reads `report.json` back.

        Raises:
            SourceError: not a report, or one of another schema.
        """
        try:
            content = json.loads(text)
            schema = content["schema"]
            if schema != SCHEMA:
                newer = isinstance(schema, int) and schema > SCHEMA
                mend = "update divergence" if newer else "run compare again"
                raise SourceError(f"{where}: report schema {schema}, this version reads {SCHEMA}; {mend}")
            if content.get("kind") == "chain":
                first = f"1-{file_name(content['names'][0])}"
                raise SourceError(
                    f"{where}: the report of a chain; name that of one of its candidates, such as {first} "
                    "beside it, or read it with divergence.Chain.from_json"
                )
            if content.get("kind") in {"pairs", "session"}:
                raise SourceError(
                    f"{where}: the index of several reports; name one of them, such as "
                    f"{content['comparisons'][0]['folder']} beside it"
                )
            return from_plain(cls, content)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise SourceError(f"{where}: not a report of divergence ({one_line(error)})") from error


def load_report(path: str | Path) -> Comparison:
    """The report of one candidate in the folder or file `path`, which may be a URL.

    Raises:
        SourceError: there is none, or it cannot be read.
        StorageError: the URL cannot be read.
    """
    try:
        text, where = report_text(path)
    except (SourceError, StorageError) as missing:
        try:
            text, where = report_text(path, "index.json")  # of several, which is refused with their names
        except (SourceError, StorageError):
            raise missing from None
    return Comparison.from_json(text, where)


def report_text(path: str | Path, name: str = "report.json") -> tuple[str, str]:
    """The text of the file `name` in the folder `path`, or of the file `path`, and where it is, for
    messages.

    Raises:
        SourceError: there is none, or it is no text.
        StorageError: the URL cannot be read.
    """
    if isinstance(path, str) and "://" in path:
        from divergence.storage import located, read_text

        place = located(path)
    else:
        place = Path(path)
    file = place / name if isinstance(place, Path) and place.is_dir() else place
    try:
        if isinstance(file, str):
            return read_text(file, name)
        return file.read_text(encoding="utf-8"), str(file)
    except FileNotFoundError as error:
        raise SourceError(f"{file}: no such report; give the folder that compare --out wrote") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{file}: not a report of divergence (not text in UTF-8)") from error


def as_plain(value: Any) -> Any:
    """`value` in JSON's own types: dataclasses as objects of their fields, NaN and infinities as null.
    A field whose name is a word of Python's, and so ends in an underscore, is written without it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name.rstrip("_"): as_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): as_plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [as_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


NESTED: Mapping[str, type[Any]] = {
    "first_divergence": FirstDivergence,
    "policy": Policy,
    "sites": SiteResult,
    "unmatched": Unmatched,
    "causes": Cause,
    "diagnosis": Hypothesis,
    "profile": Profile,
}


def from_plain(kind: type[T], content: Mapping[str, Any], nested: Mapping[str, type[Any]] = NESTED) -> T:
    """What `as_plain` wrote, as a `kind`; unknown keys are left out, as a later version may add some.

    Args:
        kind: a dataclass.
        content: of a JSON object.
        nested: dataclass by name of the field that holds one or several of it.

    Raises:
        TypeError: a field without a default is missing.
    """
    names = {f.name.rstrip("_"): f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = names.get(key)
        if name is None:
            continue
        inner = nested.get(name)
        if inner is not None and isinstance(value, list):
            values[name] = tuple(from_plain(inner, item, nested) for item in value)
        elif inner is not None and isinstance(value, Mapping) and kind is not Policy:
            values[name] = from_plain(inner, value, nested)
        elif isinstance(value, list):
            values[name] = tuple(value)
        else:
            values[name] = value
    return kind(**values)
