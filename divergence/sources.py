"""Sources: what `--ref` and `--cand` name, and which probe runs each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from divergence.captures import partial_of
from divergence.config import Config, SourceConfig
from divergence.errors import ConfigurationError, SourceError, nearest
from divergence.probes import Description, Probe, Progress, RunFacts, Sink, silent

if TYPE_CHECKING:
    import torch

    from divergence.captures import Capture
    from divergence.probes.tensorrt.options import EngineOptions

ENGINE_SUFFIXES = (".plan", ".engine", ".trt")
MODEL_SUFFIXES = (".onnx", *ENGINE_SUFFIXES)


def open_source(
    source: object,
    config: Config,
    *,
    reference: Capture | None = None,
    memory: int = 512 << 20,
    engine: EngineOptions | None = None,
) -> Probe:
    """The probe for a source.

    Args:
        source: `pytorch`, `pytorch:FILE.py:FUNC`, `pytorch:MODULE:FUNC`, a path to an ONNX file, a
            TensorRT engine or a capture, a capture's URL, a name from the configuration, a `torch.nn.Module`,
            or a probe.
        config: the configuration that names refer to.
        reference: capture of the reference, which helps to find the sites of an ONNX model.
        memory: bytes that an ONNX model's exposed tensors may take at a time.
        engine: how a TensorRT engine is run.

    Raises:
        SourceError: there is no such source, or it cannot be opened.
        ConfigurationError: `source` is a name that the configuration lacks.
    """
    if isinstance(source, Probe):
        return source
    if isinstance(source, str | Path):
        name = str(source)
        settings = config.sources.get(name)
        if settings is None:
            settings = _from_text(name, config)
        probe = _open(name, settings, config, reference, memory, engine)
        return Renamed(probe, settings.inputs) if settings.inputs and probe.kind != "pytorch" else probe
    from torch import nn

    if isinstance(source, nn.Module):
        from divergence.probes.pytorch import PyTorchProbe

        return PyTorchProbe(source, "pytorch")
    raise SourceError(
        f"a source is a name, a path, a torch.nn.Module or a probe, not {type(source).__name__}"
    )


def settings_of(source: object, config: Config) -> SourceConfig | None:
    """What the configuration says of a source that is a name, or what its name says; None for objects and
    for names that say nothing."""
    if not isinstance(source, str | Path):
        return None
    known = config.sources.get(str(source))
    if known is not None:
        return known
    try:
        return _from_text(str(source), config)
    except (ConfigurationError, SourceError):
        return None


def is_runtime_file(source: str | Path, config: Config) -> bool:
    """Whether `source` names an ONNX file or a TensorRT engine, which take a while to load."""
    settings = settings_of(source, config)
    return settings is not None and not settings.model and _suffix(settings) in MODEL_SUFFIXES


def is_capture(source: object, config: Config) -> bool:
    """Whether `source` is a capture, or names one."""
    from divergence.probes.recorded import RecordedProbe

    if isinstance(source, RecordedProbe):
        return True
    settings = settings_of(source, config)
    if settings is None or settings.path is None:
        return False
    path = _on_disk(settings.path)
    return path is None or _holds_capture(path)


def is_engine(settings: SourceConfig) -> bool:
    """Whether a source is a TensorRT engine."""
    return not settings.model and _suffix(settings) in ENGINE_SUFFIXES


def _suffix(settings: SourceConfig) -> str:
    return Path(settings.path or "").suffix


def _from_text(name: str, config: Config) -> SourceConfig:
    if not name.strip():
        raise SourceError(
            "a source is empty, as of a variable that is not set; name a file, a capture or "
            "pytorch:FILE.py:FUNC"
        )
    if name.startswith("pytorch:"):
        return SourceConfig(model=name.removeprefix("pytorch:"))
    if name == "pytorch":
        raise ConfigurationError(
            "source 'pytorch' is not configured: write [sources.pytorch] model = \"FILE.py:FUNC\" in "
            "divergence.toml, or name the function as pytorch:FILE.py:FUNC"
        )
    path = Path(name)
    known = "://" in name or path.suffix in (*MODEL_SUFFIXES, ".capture")
    if known or path.exists() or partial_of(path).exists():
        return SourceConfig(path=name)
    raise SourceError(
        f"{name}: no such file, and no source of that name in the configuration"
        f"{nearest(name, config.sources)}"
    )


def _open(
    name: str,
    settings: SourceConfig,
    config: Config,
    reference: Capture | None,
    memory: int,
    engine: EngineOptions | None,
) -> Probe:
    if settings.model is not None:
        return _pytorch(name, settings, config)
    if settings.path is None:
        raise ConfigurationError(f"source '{name}': give it a model or a path")
    path = _on_disk(settings.path)
    if path is None:
        from divergence.probes.recorded import RecordedProbe

        return RecordedProbe(settings.path)
    if path.suffix in ENGINE_SUFFIXES:
        from divergence.probes.tensorrt.probe import TensorRTProbe

        options = _engine_options(settings, engine)
        return TensorRTProbe(path, options=options, reference=reference, sites=settings.sites)
    if _holds_capture(path):
        from divergence.probes.recorded import RecordedProbe

        return RecordedProbe(path)
    from divergence.probes.onnx.probe import OnnxProbe

    return OnnxProbe(
        path,
        reference=reference,
        sites=settings.sites,
        provider=settings.provider or "CPUExecutionProvider",
        memory=memory,
    )


def _holds_capture(path: Path) -> bool:
    if path.suffix in ENGINE_SUFFIXES:
        return False
    return path.is_dir() or path.suffix == ".capture" or partial_of(path).exists()


def _on_disk(path: str) -> Path | None:
    """Where a source lies on the disk; None for what lies at a URL, which can only be a capture."""
    if "://" not in path:
        return Path(path)
    from divergence.storage import located

    place = located(path)
    if isinstance(place, Path):
        return place
    if Path(place).suffix in MODEL_SUFFIXES:
        raise SourceError(f"{place}: only captures and inputs are read from a URL; copy the model here")
    return None


def _engine_options(settings: SourceConfig, given: EngineOptions | None) -> EngineOptions:
    """What the command line gives, else the configuration; plugins of both."""
    from divergence.probes.tensorrt.options import EngineOptions

    options = given or EngineOptions()
    host = options.host if options.host != EngineOptions.host else settings.host or EngineOptions.host
    return replace(options, host=host, plugins=(*settings.plugins, *options.plugins))


def _pytorch(name: str, settings: SourceConfig, config: Config) -> Probe:
    from torch import nn

    from divergence.inputs import describe_exception, import_callable
    from divergence.precision import torch_dtype
    from divergence.probes.pytorch import PyTorchProbe

    assert settings.model is not None
    function = import_callable(settings.model, config.base)
    file = getattr(getattr(function, "__code__", None), "co_filename", None)

    def load() -> Any:
        try:
            model: Any = function()
        except (Exception, SystemExit) as error:
            raise SourceError(
                f"{name}: {settings.model} raised {describe_exception(error, file)}; mend the function that "
                "loads the model"
            ) from error
        if settings.dtype is not None and isinstance(model, nn.Module):
            dtype = torch_dtype(settings.dtype)
            # Parameters only: rounding buffers such as inv_freq would plant a fault.
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
        return model

    return PyTorchProbe(load(), name, {ours: theirs for theirs, ours in settings.inputs.items()}, load=load)


@runtime_checkable
class Weighted(Protocol):
    """A probe of a source that shows its weights."""

    def weights(self) -> Mapping[str, torch.Tensor]:
        """Weights by name, which hold nothing of the probe but them."""


def weights_of(probe: Probe) -> Mapping[str, torch.Tensor]:
    """The weights of what a probe runs, by name; empty where it shows none."""
    inner = getattr(probe, "probe", probe)
    return inner.weights() if isinstance(inner, Weighted) else {}


class Renamed:
    """A probe whose inputs have other names than ours.

    Args:
        probe: the probe.
        names: our name by the source's input name.
    """

    def __init__(self, probe: Probe, names: Mapping[str, str]) -> None:
        self.probe = probe
        self._names = {ours: theirs for theirs, ours in names.items()}

    @property
    def kind(self) -> str:
        """Kind of the probe within."""
        return self.probe.kind

    def describe(self, inputs: Mapping[str, torch.Tensor] | None = None) -> Description:
        """See `divergence.probes.Probe`."""
        return self.probe.describe(None if inputs is None else self._renamed(inputs))

    def run(
        self,
        inputs: Mapping[str, torch.Tensor],
        sink: Sink,
        *,
        detail: bool = False,
        progress: Progress = silent,
    ) -> RunFacts:
        """See `divergence.probes.Probe`."""
        return self.probe.run(self._renamed(inputs), sink, detail=detail, progress=progress)

    def _renamed(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self._names.get(name, name): tensor for name, tensor in inputs.items()}
