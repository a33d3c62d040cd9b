"""The probe of TensorRT engines."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from divergence.comparison import compare_tensors
from divergence.errors import DivergenceError, SourceError
from divergence.precision import coarsest_of
from divergence.probes import Description, Observation, Progress, RunFacts, Sink, SiteInfo, silent
from divergence.probes.onnx.found import Found
from divergence.probes.onnx.nodes import nodes_from_json
from divergence.probes.tensorrt.contract import Contract, make_contract
from divergence.probes.tensorrt.inspector import parse_inspector
from divergence.probes.tensorrt.options import EngineOptions
from divergence.probes.tensorrt.outputs import name_as_reference, sites_of
from divergence.probes.tensorrt.plan import PlanHeader, digest_of, read_header
from divergence.probes.tensorrt.process import Worker
from divergence.probes.tensorrt.remarks import hazard_of, remarks_on
from divergence.probes.tensorrt.sidecar import Sidecar, load_sidecar, plain_of, verify
from divergence.sites import DETAIL_TENSORS
from divergence.working import in_background

if TYPE_CHECKING:
    import torch

    from divergence.captures import Capture

LOAD = "divergence.probes.tensorrt.loading:load"
RUN = "divergence.probes.tensorrt.engine:run"
LATENCY = "divergence.probes.tensorrt.engine:latency"
DESCRIBE = "divergence.probes.tensorrt.engine:describe"
BOTH = ("torch", "pycuda")
_INPUTS = "inputs"

# The inspector's words for types.
_WORDS = {"Float": "fp32", "TF32": "tf32", "Half": "fp16", "BFloat16": "bf16", "FP8": "fp8", "Int8": "int8"}


class Runner(Protocol):
    """What runs jobs; `Worker` is one."""

    def call(
        self, job: str, request: Mapping[str, Any], *, about: str, progress: Progress = silent
    ) -> dict[str, Any]:
        """See `Worker.call`."""


@dataclass(frozen=True)
class _Ahead:
    """A run that was started before it was asked for."""

    inputs: Mapping[str, torch.Tensor]
    folder: tempfile.TemporaryDirectory[str]

    @property
    def path(self) -> Path:
        return Path(self.folder.name)


class TensorRTProbe:
    """Runs an engine in a worker process and hands over the tensors at its sites.

    Args:
        path: the plan. A sidecar beside it (`divergence build`) says which tensors are sites.
        options: how to run it.
        reference: capture of the reference, which names the stack that output names leave open; may be
            set later.
        sites: name of a tensor of the engine by site.
        runner: what runs jobs instead of a worker of its own, for tests.

    Raises:
        SourceError: the file is missing, no plan, or not the one that its sidecar describes.
    """

    kind = "tensorrt"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        options: EngineOptions | None = None,
        reference: Capture | None = None,
        sites: Mapping[str, str] | None = None,
        runner: Runner | None = None,
    ) -> None:
        self.path = Path(path)
        self.options = options or EngineOptions()
        self.header: PlanHeader = read_header(self.path)
        self.sidecar: Sidecar | None = load_sidecar(self.path)
        self.reference = reference
        self._overrides = sites or {}
        self._given = runner
        self._worker: Worker | None = None
        self._verified: Future[None] | None = None
        self._ahead: _Ahead | None = None

    def start(self, *, detail: bool = False, host: str | None = None) -> None:  # noqa: ARG002 - the same engine either way
        """Gets ready while other work is done: the worker loads the engine, the plan is verified.

        Args:
            detail: as the run will be.
            host: what will run it; by default the first of the options'.
        """
        if self._given is None and self._worker is None:
            loads = (host or self.options.host) in ("torch", "both")
            self._worker = Worker(preload=("tensorrt",)) if loads else Worker()
            if loads:
                self._worker.post(LOAD, self._request(), about=str(self.path))
        if self.sidecar is not None and self._verified is None:
            self._verified = in_background(partial(verify, self.path, self.sidecar), "verify-plan")

    def begin(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Starts the run on `inputs` after `start`, while other work is done; the latency is taken when `run`
        asks, so that the other work does not disturb it."""
        options = self.options
        if self._worker is None or self._ahead is not None or options.host != "torch" or options.hazards:
            return
        ahead = _Ahead(inputs, tempfile.TemporaryDirectory(prefix="divergence-engine-"))
        try:
            request = self._run_request(_saved(inputs, ahead.path), "torch", self.path)
            self._worker.post(RUN, {**self._request(), **request, "timed": False}, about=str(self.path))
        except Exception:
            ahead.folder.cleanup()  # `run` will say what is wrong
        else:
            self._ahead = ahead

    def refer(self, reference: Capture) -> None:
        """Takes the reference's run, which came after the probe was made."""
        self.reference = reference

    def close(self) -> None:
        """Ends the worker."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        if self._ahead is not None:
            self._ahead.folder.cleanup()
            self._ahead = None

    def describe(self, inputs: Mapping[str, torch.Tensor] | None = None) -> Description:  # noqa: ARG002 - an engine says it without a run
        """The sites of the engine, and its contract.

        Raises:
            SourceError: the engine cannot be loaded here.
        """
        facts = self._call(DESCRIBE, {})
        self.close()
        tensors = {io["name"]: io for io in facts["io"]}
        outputs = [name for name, io in tensors.items() if not io["input"]]
        looks = self.sidecar is not None and self.sidecar.look == "debug"
        debug = [o.name for o in self.sidecar.outputs] if self.sidecar and looks else []
        found = self._sites([*outputs, *(n for n in debug if n not in outputs)])
        contract = self._contract(facts["inspector"])
        return Description(
            str(self.path),
            self.kind,
            self._precision(contract),
            tuple(SiteInfo(f.site, f.how, *_typed(tensors.get(f.value))) for f in found),
            {name: f"{io['dtype']}{io['shape']}" for name, io in tensors.items() if io["input"]},
            tuple(self._notes(facts)),
            contract=contract.to_json() if contract else {},
        )

    def run(
        self,
        inputs: Mapping[str, torch.Tensor],
        sink: Sink,
        *,
        detail: bool = False,
        progress: Progress = silent,
    ) -> RunFacts:
        """Runs the engine at least twice and hands over the first run's tensors.

        Args:
            inputs: tensors by input name; those that the engine does not take are left out.
            sink: called once per site.
            detail: also the sites of `divergence.sites.DETAIL_TENSORS`.
            progress: told about steps.

        Raises:
            SourceError: the engine cannot be loaded or run here.
            InputError: `inputs` do not fit.
        """
        if self._ahead is not None and self._ahead.inputs is not inputs:
            self.close()
        with tempfile.TemporaryDirectory(prefix="divergence-engine-") as name:
            folder = self._ahead.path if self._ahead else _saved(inputs, Path(name))
            hosts = BOTH if self.options.host == "both" else (self.options.host,)
            runs = {h: self._run(folder, h, self.path, progress) for h in hosts}
            facts, tensors = runs[hosts[0]]
            found = self._sites(list(tensors))
            if self.reference is not None:
                found = name_as_reference(found, tensors, self.reference)
            wanted = [f for f in found if detail or f.site.tensor not in DETAIL_TENSORS]
            for item in wanted:
                own = item.tensor(tensors[item.value])
                sink(Observation(item.site, own, item.axes_of(own), item.how))
            hazard = hazard_of(runs)
            observer = self._observe(folder, hosts[0], tensors, progress)
            self.close()
        contract = self._contract(facts["inspector"])
        stacks = tuple(dict.fromkeys(f.site.stack for f in found if f.site.layer is not None))
        notes = [*self._notes(facts), *remarks_on(hazard, observer), *self._advice(found)]
        return RunFacts(
            kind=self.kind,
            source=str(self.path),
            model_digest=self.sidecar.plan_digest if self.sidecar else digest_of(self.path),
            precision=self._precision(contract),
            stacks=stacks or ("",),
            versions={"tensorrt": facts["machine"]["tensorrt"]},
            notes=tuple(notes),
            outputs=tuple(f.site.tensor for f in wanted if f.site.layer is None),
            details={
                **{k: facts[k] for k in ("machine", "host", "runs", "load_s", "latency_ms")},
                "varying": facts["varying"],
                "unwritten": facts["unwritten"],
                "stream_hazard": hazard,
                "observer": observer,
                "contract": contract.to_json() if contract else {},
            },
        )

    def _call(self, job: str, request: Mapping[str, Any], progress: Progress = silent) -> dict[str, Any]:
        self.start(host=request.get("host"))
        self._verify()
        runner = self._given or self._worker
        assert runner is not None
        try:
            return runner.call(job, {**self._request(), **request}, about=str(self.path), progress=progress)
        except SourceError:
            self.close()  # a worker that died, or whose CUDA context is broken, serves nobody
            raise

    def _fetched(self, request: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        """What the run that `begin` started found. One that failed is tried again: the reference, which had
        its part of the device's memory, is done."""
        assert self._worker is not None
        try:
            self._verify()
            facts = self._worker.fetch(about=str(self.path), progress=progress)
        except DivergenceError as error:
            if isinstance(error, SourceError) and self._worker.alive:
                return self._call(RUN, request, progress)
            self.close()
            raise
        return {**facts, **self._call(LATENCY, {})}

    def _verify(self) -> None:
        """Waits until the plan is known to be the one that its sidecar describes."""
        if self._verified is not None:
            self._verified.result()

    def _request(self) -> dict[str, Any]:
        return {
            "plan": str(self.path),
            "version": ".".join(map(str, self.header.version)),
            "built": dict(self.sidecar.built) if self.sidecar else {},
            "plugins": list(self.options.plugins),
        }

    def _run(
        self, folder: Path, host: str, plan: Path, progress: Progress
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        from safetensors.torch import load_file

        request = self._run_request(folder, host, plan)
        if host == "pycuda" and self.options.host == "both":
            self.close()  # a process of its own, so that neither host lives on the other's context
        if self._ahead is not None and plan == self.path:
            facts = self._fetched(request, progress)
        else:
            facts = self._call(RUN, request, progress)
        return facts, load_file(request["outputs"])

    def _run_request(self, folder: Path, host: str, plan: Path) -> dict[str, Any]:
        return {
            "plan": str(plan),
            "inputs": str(folder / _INPUTS),
            "outputs": str(folder / f"{plan.stem}-{host.rpartition(':')[2]}"),
            "host": host,
            "context": self.options.context,
            "profile": self.options.profile,
            "runs": self.options.runs,
            "hazards": self.options.hazards or self.options.host != "torch",
        }

    @property
    def expected_precision(self) -> str | None:
        """What it was built in, where its sidecar says so: known before it has run."""
        return self.sidecar.precision if self.sidecar else None

    def _sites(self, tensors: list[str]) -> list[Found]:
        stacks = self.reference.facts.stacks if self.reference else ()
        return sites_of(tensors, self.sidecar, self._overrides, str(self.path), stacks)

    def _contract(self, text: str) -> Contract | None:
        try:
            layers = parse_inspector(text, str(self.path))
        except SourceError:
            return None
        nodes = nodes_from_json(list(self.sidecar.nodes)) if self.sidecar else ()
        requested = str(self.sidecar.options.get("precision", "")) if self.sidecar else ""
        return make_contract(layers, nodes, requested=requested)

    def _precision(self, contract: Contract | None) -> str | None:
        if self.sidecar is not None:
            return self.sidecar.precision
        return _products_run_in(contract) if contract else None

    def _notes(self, facts: Mapping[str, Any]) -> list[str]:
        notes = list(facts.get("notes", ()))
        if self.sidecar is not None:
            notes.extend(w for w in self.sidecar.warnings if w.startswith("Value "))
            if self.sidecar.look == "debug" and "debug" in facts:
                shown = {*facts["debug"], *(io["name"] for io in facts["io"])}
                missing = [o.site for o in self.sidecar.outputs if o.name not in shown]
                notes.extend(f"The engine did not hand out the debug tensor of {site}." for site in missing)
        for name, count in facts.get("unwritten", {}).items():
            notes.append(
                f"The engine never wrote {count} elements of its tensor {name}: they still hold the poison."
            )
        for name, count in facts.get("varying", {}).items():
            notes.append(f"{count} elements of {name} changed from run to run: the engine is not repeatable.")
        return notes

    def _advice(self, found: list[Found]) -> list[str]:
        layered = {f.site.tensor for f in found if f.site.layer is not None}
        build = (
            "build it with `divergence build model.onnx --out engine.plan`, which makes every site visible"
        )
        if not found or (not layered and not any("key" in f.value.lower() for f in found)):
            return [
                f"The engine gives its final outputs only: they say that it is wrong, not where; {build}."
            ]
        if "hidden" not in layered:
            return [f"The engine gives no hidden states: what a layer adds cannot be told apart; {build}."]
        return []

    def _observe(
        self, folder: Path, host: str, seen: Mapping[str, torch.Tensor], progress: Progress
    ) -> dict[str, Any] | None:
        """The final outputs of the engine without added outputs against those of this one."""
        plain = plain_of(self.path, self.sidecar) if self.sidecar else None
        if self.sidecar is None or plain is None:
            return None
        facts, tensors = self._run(folder, host, plain, progress)
        outputs = {}
        for name in self.sidecar.own_outputs:
            if name in tensors and name in seen:
                metrics = compare_tensors(tensors[name], seen[name])
                outputs[name] = {
                    "bit_equal": metrics.bit_equal,
                    "max_abs": metrics.max_abs,
                    "rel_l2": metrics.rel_l2,
                }
        return {
            "changed": not all(o["bit_equal"] for o in outputs.values()),
            "outputs": outputs,
            "latency_ms": facts["latency_ms"],
        }


def _saved(inputs: Mapping[str, torch.Tensor], folder: Path) -> Path:
    from safetensors.torch import save_file

    save_file({name: t.detach().cpu().contiguous() for name, t in inputs.items()}, folder / _INPUTS)
    return folder


def _products_run_in(contract: Contract) -> str | None:
    """The coarsest precision in which products with weights ran, or None if none says it."""
    words = {word for row in contract.rows if row.role in ("projection", "mlp") for word in row.precisions}
    return coarsest_of(_WORDS[word] for word in words if word in _WORDS)


def _typed(io: Mapping[str, Any] | None) -> tuple[str, tuple[int | str, ...]]:
    return (io["dtype"], tuple("?" if n == -1 else n for n in io["shape"])) if io else ("", ())
