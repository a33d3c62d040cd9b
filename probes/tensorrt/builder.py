"""Job of the worker that builds engines. Imported by the worker only."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorrt as trt

from divergence.errors import ConfigurationError, SourceError
from divergence.probes import Progress
from divergence.probes.tensorrt.loading import Logger, here, load_plugins

FLAGS: Mapping[str, tuple[str, ...]] = {
    "fp32": (),
    "tf32": ("TF32",),
    "fp16": ("FP16", "TF32"),
    "bf16": ("BF16", "TF32"),
    "int8": ("INT8", "FP16", "TF32"),
    "fp8": ("FP8", "FP16", "TF32"),
    "typed": ("TF32",),
}
"""Builder flags by precision. All but `typed` let TensorRT choose the type of every layer among those
allowed; TF32 is TensorRT's default and cleared for `fp32` alone."""


class _Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # ships no types
    """Passes TensorRT's progress on."""

    def __init__(self, label: str, progress: Progress) -> None:
        super().__init__()
        self._label = label
        self._progress = progress
        self._steps: dict[str, int] = {}

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """Called by TensorRT."""
        if parent_phase is None:
            self._steps[phase_name] = num_steps

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Called by TensorRT; answers whether to go on."""
        if phase_name in self._steps:
            self._progress(f"{self._label}: {phase_name}", step, self._steps[phase_name])
        return True

    def phase_finish(self, phase_name: str) -> None:
        """Called by TensorRT."""
        self._steps.pop(phase_name, None)


def build(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Builds an engine from an ONNX file, and the plain one beside it if asked.

    Args:
        request: `model`, `out`, `plain` (file or None), `values` (names to make visible), `look`
            (`outputs`, `debug`, `none`), `widely_read` (of the values, those that become outputs either way),
            `precision`, `level`, `workspace_mib`, `timing_cache`,
            `version_compatible`, `profiles` (by input: lists of min, opt, max shapes, one a profile),
            `plugins`.
        progress: told about the builder's phases.

    Returns:
        `machine`, `warnings`, `seconds` (by file), `lost` (values that the network does not have).

    Raises:
        SourceError: the parser or the builder refuses; the message carries its words.
    """
    warnings: list[str] = []
    seconds: dict[str, float] = {}
    lost: list[str] = []
    plans = [(request["out"], request["values"] if request["look"] != "none" else [])]
    if request.get("plain"):
        plans.append((request["plain"], []))
    for out, values in plans:
        started = time.monotonic()
        logger = Logger()
        missing = _build_one(request, Path(out), values, logger, progress)
        lost.extend(missing)
        seconds[Path(out).name] = round(time.monotonic() - started, 2)
        warnings.extend(w for w in logger.warnings if w not in warnings)
    return {"machine": here(), "warnings": warnings, "seconds": seconds, "lost": lost}


def _build_one(
    request: Mapping[str, Any], out: Path, values: Sequence[str], logger: Logger, progress: Progress
) -> list[str]:
    model = request["model"]
    load_plugins(logger, request.get("plugins", []))
    builder = trt.Builder(logger)
    typed = request["precision"] == "typed"
    flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(flag) if typed else 0)
    parser = trt.OnnxParser(network, logger)
    progress(f"{out.name}: parsing the model", 0, 0)
    if not parser.parse_from_file(model):
        reasons = "; ".join(_parser_errors(parser)) or "; ".join(logger.errors) or "no reason given"
        raise SourceError(f"{model}: TensorRT's parser refuses the model ({' '.join(reasons.split())[:400]})")
    lost = _make_visible(network, values, request["look"], request["widely_read"])
    config = _config(builder, network, request)
    config.progress_monitor = _Monitor(out.name, progress)
    cache = _timing_cache(config, request.get("timing_cache"))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        said = " ".join((logger.errors or ["no reason given"])[-1].split())[:400]
        raise SourceError(f"{model}: TensorRT could not build the engine in {request['precision']} ({said})")
    partial = out.with_name(out.name + ".partial")
    with partial.open("wb") as file:
        file.write(plan)
    partial.replace(out)
    if cache is not None:
        Path(request["timing_cache"]).write_bytes(bytes(config.get_timing_cache().serialize()))
    return lost


def _parser_errors(parser: trt.OnnxParser) -> Iterator[str]:
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        yield f"node {error.node_name()} ({error.node_operator()}): {error.desc()}"


def _make_visible(
    network: trt.INetworkDefinition, values: Sequence[str], look: str, widely_read: Sequence[str] = ()
) -> list[str]:
    """Marks `values` as outputs or debug tensors; returns those that the network does not have.

    Those that are `widely_read`, as hidden states are by several layers, become outputs either way: marked as
    debug tensors they, and copies of them that one reader reads, crash TensorRT 10.6's builder, and a copy
    that nothing reads it leaves out.
    """
    wanted = set(values)
    have = {network.get_output(i).name for i in range(network.num_outputs)}
    wanted -= have
    for layer in map(network.get_layer, range(network.num_layers)):
        for tensor in map(layer.get_output, range(layer.num_outputs)):
            if tensor is None or tensor.name not in wanted:
                continue
            wanted.discard(tensor.name)
            if look == "outputs" or tensor.name in widely_read:
                network.mark_output(tensor)
            else:
                network.mark_debug(tensor)
    return sorted(wanted)


def _config(
    builder: trt.Builder, network: trt.INetworkDefinition, request: Mapping[str, Any]
) -> trt.IBuilderConfig:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    for name in FLAGS[request["precision"]]:
        config.set_flag(getattr(trt.BuilderFlag, name))
    if request.get("version_compatible"):
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request.get("level") is not None:
        config.builder_optimization_level = request["level"]
    if request.get("workspace_mib"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_mib"] << 20)
    profiles = request.get("profiles") or {}
    dynamic = [
        tensor for tensor in map(network.get_input, range(network.num_inputs)) if -1 in tuple(tensor.shape)
    ]
    missing = [tensor.name for tensor in dynamic if tensor.name not in profiles]
    if missing:
        raise ConfigurationError(
            f"{request['model']}: input '{missing[0]}' has axes of any size; give --inputs FILE to build for "
            f"its shape, or --shape {missing[0]}=MIN,OPT,MAX (such as 1x1,1x128,1x1024)"
        )
    for index in range(max((len(profiles[tensor.name]) for tensor in dynamic), default=0)):
        profile = builder.create_optimization_profile()
        for tensor in dynamic:
            shapes = profiles[tensor.name]
            profile.set_shape(tensor.name, *(tuple(s) for s in shapes[min(index, len(shapes) - 1)]))
        if config.add_optimization_profile(profile) < 0:
            raise ConfigurationError(f"{request['model']}: TensorRT refuses the shapes of profile {index}")
    return config


def _timing_cache(config: trt.IBuilderConfig, path: str | None) -> trt.ITimingCache | None:
    if path is None:
        return None
    file = Path(path)
    cache = config.create_timing_cache(file.read_bytes() if file.exists() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache
