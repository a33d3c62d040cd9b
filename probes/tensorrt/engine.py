"""Jobs of the worker on a finished engine: run it, read it."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tensorrt as trt
import torch
from safetensors.torch import load_file, save_file

from divergence.errors import InputError, SourceError
from divergence.inputs import called
from divergence.precision import dtype_name
from divergence.probes import Progress
from divergence.probes.tensorrt.hazards import cycle, find_hazards
from divergence.probes.tensorrt.hosts import DTYPES, DebugTensors, Host, PycudaHost, Slot, TorchHost
from divergence.probes.tensorrt.loading import Logger, deserialize, here, load_engine, load_plugins, loaded
from divergence.probes.tensorrt.poison import NAN_BYTE, OTHER_BYTE, differences, unwritten

_TIMED_S = 0.2
_TIMED_RUNS = (3, 30)
_untimed: list[Host] = []


def run(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Runs an engine and writes its outputs.

    Args:
        request: `plan`, `inputs` (safetensors file), `outputs` (file to write), `host` (`torch`,
            `pycuda`, `FILE.py:CLASS`), `context` (`primary`, `own`), `plugins`, `profile`, `runs`,
            `hazards` (whether to look for them), `timed` (False leaves the latency to `latency`), `built`
            and `version` (who built the plan).
        progress: told about steps.

    Returns:
        Facts: `machine`, `io`, `notes`, `latency_ms`, `runs`, `varying` and `unwritten` (element
        counts by output), `hazards` (or None), `inspector` (text), `warnings`, `debug` (names).
    """
    progress("loading the engine", 0, 0)
    started = time.monotonic()
    ready = loaded(request["plan"])
    if ready is not None:
        logger, engine, load_s = ready
        host = _host(request)(lambda: engine)
    else:
        logger = Logger()
        load_plugins(logger, request.get("plugins", []))
        host = _host(request)(lambda: deserialize(logger, request))
        load_s = time.monotonic() - started
    try:
        notes = _bind(host, load_file(request["inputs"]), request)
        listener = _listen(host)
        progress("running the engine", 0, 0)
        first = cycle(host, NAN_BYTE)
        debug = _heard(listener)
        varying: dict[str, int] = {}
        for index in range(1, max(2, request.get("runs", 2))):
            second = cycle(host, OTHER_BYTE if index == 1 else NAN_BYTE)
            if index == 1:
                never = unwritten(first, second)
            for name, count in differences(first, second).items():
                if name not in never:
                    varying[name] = max(count, varying.get(name, 0))
        if listener:
            host.context.set_all_tensors_debug_state(flag=False)
        latency_ms = _latency(host) if request.get("timed", True) else None
        hazards = [h.to_json() for h in find_hazards(host)] if request.get("hazards") else None
        save_file({**debug, **first}, request["outputs"])
        text = _inspect(host.engine)
        io = [
            {"name": s.name, "input": s.is_input, "dtype": dtype_name(s.dtype), "shape": list(s.shape)}
            for s in host.slots
        ]
    except BaseException:
        host.close()
        raise
    if latency_ms is None:
        _untimed.append(host)
    else:
        host.close()
    return {
        "machine": here(),
        "host": host.name,
        "io": io,
        "notes": notes,
        "load_s": round(load_s, 3),
        "latency_ms": latency_ms,
        "runs": max(2, request.get("runs", 2)),
        "varying": varying,
        "unwritten": never,
        "hazards": hazards,
        "inspector": text,
        "warnings": logger.warnings,
        "debug": sorted(debug),
    }


def latency(request: dict[str, Any], progress: Progress) -> dict[str, Any]:  # noqa: ARG001 - a job
    """Times the engine that `run` left untimed: `latency_ms`."""
    progress("timing the engine", 0, 0)
    host = _untimed.pop()
    try:
        return {"latency_ms": _latency(host)}
    finally:
        host.close()


def describe(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Reads an engine without running it: `machine`, `io`, `inspector`, `warnings`."""
    progress("loading the engine", 0, 0)
    logger, engine, _ = loaded(request["plan"]) or load_engine(request)
    io = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = DTYPES.get(engine.get_tensor_dtype(name))
        io.append(
            {
                "name": name,
                "input": engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
                "dtype": dtype_name(dtype) if dtype else str(engine.get_tensor_dtype(name)),
                "shape": list(engine.get_tensor_shape(name)),
            }
        )
    return {"machine": here(), "io": io, "inspector": _inspect(engine), "warnings": logger.warnings}


def _inspect(engine: trt.ICudaEngine) -> str:
    text: str = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return text


def _host(request: Mapping[str, Any]) -> Callable[[Callable[[], trt.ICudaEngine]], Host]:
    name = request.get("host", "torch")
    if name == "torch":
        return TorchHost
    if name == "pycuda":
        own = request.get("context") == "own"
        return lambda load: PycudaHost(load, own_context=own)
    file, _, attribute = name.rpartition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise SourceError(f"--host {name}: is neither torch, pycuda nor an existing FILE.py:CLASS")
    spec = importlib.util.spec_from_file_location("divergence_host", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kind = getattr(module, attribute, None)
    if not (isinstance(kind, type) and issubclass(kind, Host)):
        raise SourceError(
            f"--host {name}: {attribute} is no class derived from Host; derive it from TorchHost"
        )
    return kind


def _listen(host: Host) -> DebugTensors | None:
    listener = DebugTensors()
    if not host.context.set_debug_listener(listener):
        return None
    return listener if host.context.set_all_tensors_debug_state(flag=True) else None


def _heard(listener: DebugTensors | None) -> dict[str, torch.Tensor]:
    if listener is None:
        return {}
    if listener.failed is not None:
        raise listener.failed
    return dict(listener.tensors)


def _latency(host: Host) -> float:
    """Median milliseconds of the engine alone, enqueued to finished, after the runs before."""
    taken: list[float] = []
    started = time.monotonic()
    while len(taken) < _TIMED_RUNS[0] or (
        len(taken) < _TIMED_RUNS[1] and time.monotonic() - started < _TIMED_S
    ):
        host.upload()
        host.synchronize()
        before = time.perf_counter()
        host.execute()
        host.synchronize()
        taken.append((time.perf_counter() - before) * 1e3)
    return round(sorted(taken)[len(taken) // 2], 4)


def _bind(host: Host, given: Mapping[str, torch.Tensor], request: Mapping[str, Any]) -> list[str]:
    """Checks the inputs against the engine, and makes the buffers; returns remarks."""
    engine, context = host.engine, host.context
    path = request["plan"]
    profile = request.get("profile", 0)
    if not 0 <= profile < max(1, engine.num_optimization_profiles):
        raise InputError(
            f"{path}: has {engine.num_optimization_profiles} optimization profiles, numbered from 0; "
            f"there is no profile {profile}"
        )
    if profile:
        stream = torch.cuda.current_stream()
        context.set_optimization_profile_async(profile, stream.cuda_stream)
        stream.synchronize()
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    wanted = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
    fitting, notes = called(wanted, given, path, "engine")
    inputs = {}
    for name in wanted:
        tensor = _fitting(path, name, fitting[name], _dtype(engine, name))
        if tensor.dtype != fitting[name].dtype:
            notes.append(
                f"Input {name} was converted from {dtype_name(fitting[name].dtype)} to "
                f"{dtype_name(tensor.dtype)}, as the engine declares it."
            )
        _set_shape(engine, context, path, name, tensor, profile)
        inputs[name] = tensor
    slots = tuple(_slot(engine, context, path, name) for name in names)
    host.bind(slots, inputs)
    return notes


def _dtype(engine: trt.ICudaEngine, name: str) -> torch.dtype:
    found = DTYPES.get(engine.get_tensor_dtype(name))
    if found is None:
        raise SourceError(
            f"tensor '{name}' is {engine.get_tensor_dtype(name)}, which cannot be exchanged here"
        )
    return found


def _fitting(path: str, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` in the type that the engine takes."""
    if tensor.dtype == dtype:
        return tensor
    floats = tensor.is_floating_point(), dtype.is_floating_point
    if floats[0] != floats[1] or torch.bool in (tensor.dtype, dtype):
        raise InputError(
            f"{path}: input '{name}' is {dtype_name(tensor.dtype)}, the engine takes {dtype_name(dtype)}; "
            f"give it as {dtype_name(dtype)}"
        )
    if floats[0] and dtype is torch.float16:
        limit = torch.finfo(dtype).max  # a mask of -3e38 stays a large finite number
        tensor = torch.where(tensor.isfinite(), tensor.clamp(-limit, limit), tensor)
    converted = tensor.to(dtype)
    if not floats[0] and not torch.equal(converted.to(tensor.dtype), tensor):
        raise InputError(f"{path}: input '{name}' holds numbers that {dtype_name(dtype)} cannot hold")
    return converted


def _set_shape(
    engine: trt.ICudaEngine,
    context: trt.IExecutionContext,
    path: str,
    name: str,
    tensor: torch.Tensor,
    profile: int,
) -> None:
    declared, shape = tuple(engine.get_tensor_shape(name)), tuple(tensor.shape)
    told = f"{path}: input '{name}' has shape {list(shape)}, the engine takes {list(declared)}"
    if len(declared) != len(shape):
        raise InputError(f"{told}; give a tensor of {len(declared)} axes")
    if -1 in declared:
        low, _, high = (tuple(s) for s in engine.get_tensor_profile_shape(name, profile))
        fits = all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
        told += f" from {list(low)} to {list(high)} in profile {profile}"
    else:
        fits = declared == shape
    if not fits or not context.set_input_shape(name, shape):
        raise InputError(f"{told}; give inputs of that shape, or build the engine for this one")


def _slot(engine: trt.ICudaEngine, context: trt.IExecutionContext, path: str, name: str) -> Slot:
    shape = tuple(context.get_tensor_shape(name))
    if -1 in shape:
        raise SourceError(
            f"{path}: the shape {list(shape)} of tensor '{name}' depends on what the inputs hold, which is "
            "not supported; compare a model without such outputs"
        )
    return Slot(
        name,
        is_input=engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
        dtype=_dtype(engine, name),
        shape=shape,
        on_host=engine.get_tensor_location(name) == trt.TensorLocation.HOST,
    )
