"""The map beside an engine: what `divergence build` knew when it made it.

It lies beside the plan under the plan's name with `.json` added, and is refused where the plan is no
longer the file that it describes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from divergence.errors import SourceError, one_line
from divergence.probes.onnx.found import Found
from divergence.probes.tensorrt.plan import digest_of
from divergence.sites import Site

SCHEMA = 1


@dataclass(frozen=True)
class Output:
    """A tensor of the engine that is a site: see `divergence.probes.onnx.found.Found`."""

    name: str
    site: str
    axes: tuple[str, ...]
    found: str
    index: int | None = None
    heads: int | None = None

    @classmethod
    def of(cls, found: Found) -> Self:
        """From where the ONNX graph has it."""
        return cls(found.value, str(found.site), found.axes, found.how, found.index, found.heads)

    def as_found(self) -> Found:
        """As the ONNX probe describes sites."""
        return Found(
            Site.parse(self.site), self.name, self.axes, self.found, "sidecar", self.index, self.heads
        )


@dataclass(frozen=True)
class Sidecar:
    """What is known of an engine.

    Attributes:
        plan_digest: of the plan (`plan.digest_of`).
        model: the ONNX file it was built from, as named, and `model_digest` of its content.
        precision: what it was meant to run in (`divergence.precision.PRECISIONS`).
        options: of the build, by name.
        built: machine and versions (`engine.here`).
        outputs: the sites among its tensors.
        own_outputs: the outputs that the ONNX model has itself.
        look: `outputs`, `debug` or `none`: how the sites are made visible.
        plain: file name of the engine without added outputs, in the same folder, or None.
        plain_digest: of that plan.
        nodes: the ONNX nodes, for the contract (`divergence.probes.onnx.nodes`).
        warnings: of TensorRT's parser and builder.
        seconds: that the build took.
    """

    plan_digest: str
    model: str
    model_digest: str
    precision: str
    options: Mapping[str, Any]
    built: Mapping[str, str]
    outputs: tuple[Output, ...]
    own_outputs: tuple[str, ...]
    look: str = "outputs"
    plain: str | None = None
    plain_digest: str | None = None
    nodes: tuple[Mapping[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    schema: int = field(default=SCHEMA)

    def save(self, plan: Path) -> Path:
        """Writes it beside `plan`; returns where."""
        path = beside(plan)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return path


def beside(plan: Path) -> Path:
    """Where the sidecar of `plan` lies."""
    return plan.with_name(plan.name + ".json")


def load_sidecar(plan: Path) -> Sidecar | None:
    """The sidecar of `plan`, or None where it has none; `verify` says whether it still fits.

    Raises:
        SourceError: it cannot be read, or is of another schema.
    """
    path = beside(plan)
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise SourceError(
                f"{path}: sidecar schema {content['schema']}, this version reads {SCHEMA}; "
                "build the engine again"
            )
        outputs = tuple(
            Output(**{**output, "axes": tuple(output["axes"])}) for output in content.pop("outputs")
        )
        for name in ("own_outputs", "nodes", "warnings"):
            content[name] = tuple(content[name])
        return Sidecar(outputs=outputs, **content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"{path}: not a sidecar of divergence build ({one_line(error)}); build the engine again"
        ) from error


def plain_of(plan: Path, sidecar: Sidecar) -> Path | None:
    """The engine without added outputs, if there is one."""
    path = plan.with_name(sidecar.plain) if sidecar.plain else None
    return path if path is not None and path.exists() else None


def verify(plan: Path, sidecar: Sidecar) -> None:
    """Checks that the plans are those that the sidecar describes.

    Raises:
        SourceError: one is not.
    """
    _check_digest(plan, sidecar.plan_digest, beside(plan))
    plain = plain_of(plan, sidecar)
    if plain is not None:
        _check_digest(plain, sidecar.plain_digest or "", beside(plan))


def _check_digest(plan: Path, expected: str, path: Path) -> None:
    found = digest_of(plan)
    if found != expected:
        raise SourceError(
            f"{plan}: is not the plan that {path.name} describes (digest {found}, built as {expected}): "
            "it is damaged, or was replaced; build it again, or remove the sidecar of an engine "
            "that was built elsewhere"
        )
