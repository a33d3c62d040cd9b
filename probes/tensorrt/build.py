"""Builds engines whose layers can be looked into, and the map beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from divergence.errors import ConfigurationError, SourceError
from divergence.probes import Progress, silent
from divergence.probes.onnx.facts import digest, precision
from divergence.probes.onnx.nodes import describe_nodes, nodes_to_json
from divergence.probes.onnx.probe import OnnxProbe
from divergence.probes.tensorrt.plan import digest_of
from divergence.probes.tensorrt.process import Worker
from divergence.probes.tensorrt.sidecar import Output, Sidecar

if TYPE_CHECKING:
    import torch

    from divergence.captures import Capture
    from divergence.probes.onnx.found import Found
    from divergence.probes.onnx.graph import Graph

BUILD = "divergence.probes.tensorrt.builder:build"
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "typed", "fp8", "int8")
LOOKS = ("outputs", "debug", "none")
SUFFIXES = (".plan", ".engine", ".trt")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        precision: types that TensorRT may choose from; `typed` takes those of the ONNX model
            (a strongly typed network). `fp8` and `int8` need a quantised model.
        look: how sites are made visible: `outputs` (real outputs), `debug` (keys and values as debug tensors,
            where an output would break a fusion), or `none`.
        plain: also build the engine without added outputs, for the observer check.
        level: builder optimisation level, 0 to 5, or None for TensorRT's default.
        workspace_mib: memory that tactics may use, or None for all there is.
        timing_cache: file of measured tactics, read if it exists and written, or None.
        version_compatible: runs on later minor versions of TensorRT too.
        profiles: by input, one (min, opt, max) of shapes for every optimization profile.
        plugins: libraries to load first.
    """

    precision: str = "fp32"
    look: Literal["outputs", "debug", "none"] = "outputs"
    plain: bool = True
    level: int | None = None
    workspace_mib: int | None = None
    timing_cache: str | None = None
    version_compatible: bool = False
    profiles: Mapping[str, Sequence[tuple[Shape, Shape, Shape]]] | None = None
    plugins: tuple[str, ...] = ()


def build_engine(
    model: Path,
    out: Path,
    options: BuildOptions,
    *,
    inputs: Mapping[str, torch.Tensor] | None = None,
    reference: Capture | None = None,
    sites: Mapping[str, str] | None = None,
    detail: bool = False,
    progress: Progress = silent,
) -> Sidecar:
    """Builds an engine from an ONNX model, with its sites visible and a sidecar beside it.

    Args:
        model: the ONNX file.
        out: plan to write; an existing one is replaced when the new one is complete.
        options: how.
        inputs: their shapes are built for where the model leaves axes open; with a reference they
            also serve to find sites that only their values show.
        reference: capture of the reference on `inputs`.
        sites: value of the graph by site, which take precedence over what is found.
        detail: also make the sites of `divergence.sites.DETAIL_TENSORS` visible.
        progress: told about the builder's phases.

    Raises:
        ConfigurationError: an option is unknown or does not suit the model.
        SourceError: the model cannot be read, or TensorRT refuses it.
    """
    _check(out, options)
    with Worker() as worker:  # loads its libraries while the graph is read
        probe = OnnxProbe(model, reference=reference, sites=sites)
        graph, light, found, notes = probe.locate(inputs, detail=detail)
        _check_quantised(graph, options.precision, model)
        visible = found if options.look != "none" else ()
        request = _request(model, out, options, graph, visible, inputs)
        try:
            result = worker.call(BUILD, request, about=str(model), progress=progress)
        except SourceError as error:
            if worker.alive or options.look != "debug":
                raise
            # TensorRT 10.6 was seen to die of some debug tensors.
            raise SourceError(f"{error}; or make the sites visible otherwise (--look outputs)") from error
    lost = set(result["lost"])
    plain = Path(request["plain"]) if request["plain"] else None
    sidecar = Sidecar(
        plan_digest=digest_of(out),
        model=str(model),
        model_digest=digest(light),
        precision=_precision(graph, options.precision, model),
        options={
            "precision": options.precision,
            "level": options.level,
            "workspace_mib": options.workspace_mib,
            "version_compatible": options.version_compatible,
            "profiles": request["profiles"],
            "plugins": list(options.plugins),
        },
        built=result["machine"],
        outputs=tuple(Output.of(f) for f in visible if f.value not in lost),
        own_outputs=tuple(graph.outputs),
        look=options.look,
        plain=plain.name if plain else None,
        plain_digest=digest_of(plain) if plain else None,
        nodes=tuple(nodes_to_json(describe_nodes(graph))),
        warnings=(
            *notes,
            *(
                f"Value {name} is no tensor of TensorRT's network: its site is not visible."
                for name in result["lost"]
            ),
            *result["warnings"],
        ),
        seconds=sum(result["seconds"].values()),
    )
    sidecar.save(out)
    return sidecar


def parse_shapes(given: Sequence[str]) -> dict[str, list[tuple[Shape, Shape, Shape]]]:
    """Reads `NAME=SHAPE` or `NAME=MIN,OPT,MAX`, a shape being `1x128`; repeated for several profiles.

    Raises:
        ConfigurationError: a text is no such thing.
    """
    profiles: dict[str, list[tuple[Shape, Shape, Shape]]] = {}
    for text in given:
        name, _, rest = text.rpartition("=")
        try:
            shapes = [tuple(int(n) for n in part.split("x")) for part in rest.split(",")]
        except ValueError:
            shapes = []
        if len(shapes) == 1:
            shapes *= 3
        if not name or len(shapes) != 3 or len({len(s) for s in shapes}) != 1:
            raise ConfigurationError(
                f"--shape {text}: write it as NAME=SHAPE or NAME=MIN,OPT,MAX, such as x=1x1,1x128,1x1024"
            )
        low, best, high = shapes
        profiles.setdefault(name, []).append((low, best, high))
    return profiles


def _check(out: Path, options: BuildOptions) -> None:
    if out.suffix not in SUFFIXES:
        raise ConfigurationError(
            f"--out {out}: name the engine *{', *'.join(SUFFIXES)}, so that it is known as one"
        )
    if options.precision not in PRECISIONS:
        raise ConfigurationError(
            f"--precision {options.precision}: engines are built in one of {', '.join(PRECISIONS)}"
        )
    if options.level is not None and not 0 <= options.level <= 5:
        raise ConfigurationError(f"--level {options.level}: TensorRT has levels 0 to 5")
    if not out.parent.is_dir():
        raise ConfigurationError(f"--out {out}: the folder {out.parent} does not exist; make it first")


def _check_quantised(graph: Graph, wanted: str, model: Path) -> None:
    if wanted not in ("int8", "fp8"):
        return
    if not any(node.op_type == "QuantizeLinear" for node in graph.nodes):
        raise ConfigurationError(
            f"{model}: --precision {wanted} needs a model that says where and how it is quantised, and this "
            "one has no QuantizeLinear nodes; quantise it on real inputs first (NVIDIA ModelOpt, onnxruntime)"
        )


def _precision(graph: Graph, wanted: str, model: Path) -> str:
    if wanted != "typed":
        return wanted
    found = precision(graph)
    if found is None:
        raise SourceError(f"{model}: has no floating-point products, so its precision is not known")
    return "tf32" if found == "fp32" else found


def _request(
    model: Path,
    out: Path,
    options: BuildOptions,
    graph: Graph,
    visible: Sequence[Found],
    inputs: Mapping[str, torch.Tensor] | None,
) -> dict[str, Any]:
    profiles = {name: [list(map(list, p)) for p in all_] for name, all_ in (options.profiles or {}).items()}
    for name, tensor in (inputs or {}).items():
        shape = list(tensor.shape)
        if name in graph.inputs and name not in profiles:
            profiles[name] = [[shape, shape, shape]]
    unknown = [name for name in options.profiles or {} if name not in graph.inputs]
    if unknown:
        raise ConfigurationError(
            f"--shape {unknown[0]}: {model} has no such input; it takes {', '.join(graph.inputs)}"
        )
    adds = options.look != "none" and any(f.value not in graph.outputs for f in visible)
    plain = out.with_name(f"{out.stem}.plain{out.suffix}") if options.plain and adds else None
    return {
        "model": str(model),
        "out": str(out),
        "plain": str(plain) if plain else None,
        "values": list(dict.fromkeys(f.value for f in visible)),
        "widely_read": list(dict.fromkeys(f.value for f in visible if f.site.tensor == "hidden")),
        "look": options.look,
        "precision": options.precision,
        "level": options.level,
        "workspace_mib": options.workspace_mib,
        "timing_cache": options.timing_cache,
        "version_compatible": options.version_compatible,
        "profiles": profiles,
        "plugins": list(options.plugins),
    }
