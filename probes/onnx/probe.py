"""The probe of ONNX models, run by onnxruntime."""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

from divergence.captures import Capture
from divergence.errors import DivergenceError, SourceError, one_line
from divergence.probes import Description, Observation, Progress, RunFacts, Sink, SiteInfo, silent
from divergence.probes.onnx import facts
from divergence.probes.onnx.cuts import match_cuts
from divergence.probes.onnx.found import Found
from divergence.probes.onnx.graph import Graph, dtype_name
from divergence.probes.onnx.inputs import feeds_of
from divergence.probes.onnx.light import LightModel, read_light
from divergence.probes.onnx.mapping import SiteMap, map_graph
from divergence.probes.onnx.outputs import name_outputs, out_of_order
from divergence.probes.onnx.own_keys import OwnKeys
from divergence.probes.onnx.patterns import match_patterns
from divergence.probes.onnx.scaling import settle_scales
from divergence.probes.onnx.session import Session, check_provider
from divergence.probes.onnx.unseen import unseen_infinities
from divergence.probes.onnx.values import match_values, sizes_wanted
from divergence.probes.onnx.weights import OnnxWeights
from divergence.sites import Site

_NO_SITES = (
    "no layers were found: its nodes have neither exporter metadata nor module paths as names; give a "
    "reference run, name sites in the configuration (sites), or export with torch.onnx.export(dynamo=True)"
)


@dataclass(frozen=True)
class _Run:
    """One run: the graph with actual shapes, and the inputs as onnxruntime takes them."""

    graph: Graph
    feeds: Mapping[str, Any]
    progress: Progress


class OnnxProbe:
    """Runs an ONNX model in onnxruntime and hands over the tensors at its sites.

    Args:
        path: the ONNX file. Its weights are never copied: large ones stay in their files.
        reference: a run of the reference on the same inputs, for sites that only their values
            show, and for the names of outputs.
        sites: values of the graph by site, which take precedence over whatever is found.
        provider: onnxruntime's execution provider.
        memory: limit in bytes on the tensors fetched at a time; more sites take several runs.
        threads: threads within an operator; None leaves it to onnxruntime.

    Raises:
        SourceError: the file is missing, is not ONNX, or is cut off; its external data is missing
            or too short; or the provider is not available.
        ConfigurationError: `sites` names no site, or a value that the graph does not have.
    """

    kind = "onnx"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        reference: Capture | None = None,
        sites: Mapping[str, str] | None = None,
        provider: str = "CPUExecutionProvider",
        memory: int = 512 << 20,
        threads: int | None = None,
    ) -> None:
        check_provider(provider)
        self.path = os.fspath(path)
        self._model: LightModel = read_light(Path(path))
        with _understanding(self.path):
            self._graph = Graph(self._model.proto)
            self._overrides = sites or {}
            self._map: SiteMap = map_graph(self._graph, self._overrides, reference, self.path)
        self._reference = reference
        self._provider = provider
        self._memory = memory
        self._threads = threads
        self._session: tuple[tuple[str, ...], Session] | None = None

    @cached_property
    def _digest(self) -> str:
        return facts.digest(self._model)

    def start(self, *, detail: bool = False) -> None:
        """Loads the model into onnxruntime ahead of `run`, where its sites are known without one.

        Args:
            detail: as the run will be.

        Raises:
            SourceError: onnxruntime refuses the model.
        """
        if self._map.found:
            _ = self._digest
            values = [f.value for f in self._map.selected(detail=detail)]
            names = tuple(dict.fromkeys((*values, *self._map.outputs)))
            self._session = (
                names,
                Session(self._model, self._graph, names, self._provider, self._threads),
            )

    def refer(self, reference: Capture) -> None:
        """Takes the reference's run, which came after the probe was made."""
        self._reference = reference
        if any(site.layer is not None and site not in self._map.found for site in reference.sites):
            self._map = map_graph(self._graph, self._overrides, reference, self.path)

    def describe(self, inputs: Mapping[str, torch.Tensor] | None = None) -> Description:
        """The sites that names, scopes and the data flow show.

        Args:
            inputs: with them (and a reference), sites that only their values show are found too.

        Raises:
            SourceError: onnxruntime refuses the model.
            InputError: `inputs` do not fit.
        """
        graph, site_map, notes = self._graph, self._map, list(self._map.notes)
        outputs = [
            Found(Site.output(o), o, (), f"output {o} of the graph", "output") for o in site_map.outputs
        ]
        if inputs is not None:
            run, site_map, more = self._prepare(inputs, silent)
            graph, notes = run.graph, [*site_map.notes, *more]
            outputs = self._outputs(run, site_map)
        elif not site_map.found and not notes:
            notes.append(f"Of this graph {_NO_SITES}.")
        with _understanding(self.path):
            return Description(
                self.path,
                self.kind,
                facts.precision(graph),
                tuple(_info(graph, f) for f in (*site_map.found.values(), *outputs)),
                {name: _signature(graph, name) for name in graph.inputs},
                tuple(notes),
                facts.operators(graph),
            )

    def locate(
        self, inputs: Mapping[str, torch.Tensor] | None = None, *, detail: bool = False
    ) -> tuple[Graph, LightModel, tuple[Found, ...], tuple[str, ...]]:
        """Where the sites of layers lie in the graph, for whoever runs the model elsewhere.

        Args:
            inputs: with them (and a reference), sites that only their values show are found too.
            detail: also the sites of `divergence.sites.DETAIL_TENSORS`.

        Returns:
            The graph, the model, the sites in execution order, and remarks.

        Raises:
            SourceError: onnxruntime refuses the model.
            InputError: `inputs` do not fit.
        """
        graph, site_map, notes = self._graph, self._map, list(self._map.notes)
        if inputs is not None and self._reference is not None:
            run, site_map, more = self._prepare(inputs, silent)
            graph, notes = run.graph, [*site_map.notes, *more]
        return graph, self._model, tuple(site_map.selected(detail=detail)), tuple(notes)

    def run(
        self,
        inputs: Mapping[str, torch.Tensor],
        sink: Sink,
        *,
        detail: bool = False,
        progress: Progress = silent,
    ) -> RunFacts:
        """Runs the model and hands every site's tensor to `sink`, in execution order.

        Args:
            inputs: tensors by input name; those that the graph does not take are left out.
            sink: called once per site.
            detail: also the sites of `divergence.sites.DETAIL_TENSORS`.
            progress: told about runs.

        Raises:
            SourceError: onnxruntime refuses or fails to run the model, or no layers were found.
            InputError: `inputs` do not fit (names, dtypes, shapes).
        """
        run, site_map, notes = self._prepare(inputs, progress)
        outputs = self._outputs(run, site_map)
        wanted = [*site_map.selected(detail=detail), *outputs]
        own = OwnKeys(site_map.selected(detail=False), outputs, self._reference)
        infinite: dict[str, list[str]] = {}
        for observation, value in self._observe(run, wanted):
            tensor = observation.tensor
            if tensor.dtype == torch.float16 and bool(torch.isinf(tensor).any()):
                infinite.setdefault(value, []).append(str(observation.site))
            sink(observation)
            for again in own.saw(observation):
                sink(again)
        reasons = unseen_infinities(run.graph, infinite, lambda v: self._fetch(run, v)) if infinite else {}
        return RunFacts(
            kind=self.kind,
            source=self.path,
            model_digest=self._digest,
            precision=facts.precision(run.graph),
            stacks=site_map.stacks,
            versions={"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__},
            notes=(*site_map.notes, *notes, *own.notes, *out_of_order(outputs, self._reference)),
            unseen_inf={site: reason for value, reason in reasons.items() for site in infinite[value]},
            outputs=tuple(dict.fromkeys(found.site.tensor for found in outputs)),
            details=self._details(wanted),
        )

    def weights(self) -> OnnxWeights:
        """Weights by the names of initializers and modules; see `divergence.sources.Weighted`."""
        return OnnxWeights(self._model, self._graph)

    def _prepare(
        self, inputs: Mapping[str, torch.Tensor], progress: Progress
    ) -> tuple[_Run, SiteMap, list[str]]:
        """Checks the inputs and finds the sites that take a run to find."""
        feeds, shapes, notes = feeds_of(self._graph, inputs, self.path)
        with _understanding(self.path):
            run = _Run(Graph(self._model.proto, shapes), feeds, progress)
        site_map = self._map
        if self._reference is not None:
            with _understanding(self.path):
                site_map = self._by_reference(run, site_map, self._reference)
        elif not site_map.found:
            raise SourceError(f"{self.path}: {' '.join(site_map.notes) or _NO_SITES}")
        return run, site_map, notes

    def _by_reference(self, run: _Run, site_map: SiteMap, reference: Capture) -> SiteMap:
        settled = settle_scales(site_map.found.values(), reference, lambda v: self._fetch(run, v))
        site_map = site_map.with_instead(settled)
        missing = [site for site in reference.sites if site.layer is not None and site not in site_map.found]
        if not missing:
            return site_map
        self._session = None  # of a session for more values, both would hold the weights
        sizes = sizes_wanted(missing, reference)
        values = [
            value
            for value in run.graph.values()
            if run.graph.is_float(value) and run.graph.size(value) in {None, *sizes}
        ]
        by_value = match_values(missing, reference, self._fetch(run, values))
        site_map = site_map.with_found(by_value)
        # Twice: with the keys known, layers' outputs can be found, and with some of them the others.
        counts = {site: math.prod(reference.entries[site].shape) for site in missing}
        for find in (match_patterns, match_cuts, match_patterns):
            still = [site for site in missing if site not in site_map.found]
            site_map = site_map.with_found(find(run.graph, still, list(site_map.found.values()), counts))
        return site_map

    def _outputs(self, run: _Run, site_map: SiteMap) -> list[Found]:
        shapes = {}
        for name in site_map.outputs:
            shape = run.graph.shape(name)
            if shape is not None:
                sizes = tuple(n for n in shape if isinstance(n, int))
                if len(sizes) == len(shape):
                    shapes[name] = sizes
        return name_outputs(site_map.outputs, shapes, self._reference, lambda v: self._fetch(run, v))

    def _observe(self, run: _Run, wanted: Sequence[Found]) -> Iterator[tuple[Observation, str]]:
        """The tensors of `wanted` in order. A value that is several sites is handed over as each."""
        by_value: dict[str, list[Found]] = {}
        for found in wanted:
            by_value.setdefault(found.value, []).append(found)
        for group in self._fetch(run, list(by_value), keep=True):
            for value, tensor in group.items():
                for found in by_value[value]:
                    own = found.tensor(tensor)
                    yield Observation(found.site, own, found.axes_of(own), found.how), value

    def _fetch(
        self, run: _Run, values: Sequence[str], *, keep: bool = False
    ) -> Iterator[Mapping[str, torch.Tensor]]:
        """Runs the model for `values`, in groups that fit into the memory allowed."""
        names = tuple(dict.fromkeys(values))
        if not names:
            return
        if self._session is not None and set(names) <= set(self._session[0]):
            session = self._session[1]
        else:
            run.progress("loading into onnxruntime", 0, 0)
            if keep:
                self._session = None  # before the next one: both would hold the weights
            session = Session(self._model, self._graph, names, self._provider, self._threads)
            if keep:
                self._session = (names, session)
        sizes = facts.bytes_of(run.graph, list(names))
        done = 0
        for group in session.in_groups(run.feeds, names, sizes, self._memory):
            done += len(group)
            run.progress("running in onnxruntime", done, len(names))
            yield group

    def _details(self, wanted: Iterable[Found]) -> dict[str, Any]:
        proto = self._model.proto
        return {
            "provider": self._provider,
            "opset": {o.domain or "ai.onnx": o.version for o in proto.opset_import},
            "producer": f"{proto.producer_name} {proto.producer_version}".strip(),
            "nodes": len(self._graph.nodes),
            "found": dict(Counter(found.method for found in wanted)),
        }


@contextlib.contextmanager
def _understanding(path: str) -> Iterator[None]:
    """Says of a graph that contradicts itself, in whatever way, that it does."""
    try:
        yield
    except DivergenceError:
        raise
    except Exception as error:
        raise SourceError(
            f"{path}: its graph contradicts itself ({one_line(error)}); see what onnx.checker says of it, "
            "or export it again"
        ) from error


def _info(graph: Graph, found: Found) -> SiteInfo:
    shape = found.shape(graph.shape(found.value) or ())
    return SiteInfo(found.site, found.how, dtype_name(graph.element_type(found.value)), shape)


def _signature(graph: Graph, name: str) -> str:
    shape = graph.shape(name) or ()
    return f"{dtype_name(graph.element_type(name))}[{', '.join(map(str, shape))}]"
