"""An engine without a device: what a worker would answer, computed by the bundled model in PyTorch."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from divergence import demo
from divergence.errors import InputError
from divergence.probes import Progress, silent
from divergence.probes.onnx.found import Found
from divergence.probes.onnx.graph import Graph
from divergence.probes.onnx.light import read_light
from divergence.probes.onnx.nodes import describe_nodes, nodes_to_json
from divergence.probes.onnx.probe import OnnxProbe
from divergence.probes.tensorrt.plan import MAGIC, digest_of
from divergence.probes.tensorrt.sidecar import Output, Sidecar

TEXTS = Path(__file__).parents[1] / "data" / "tensorrt" / "inspector"
VERSION = bytes([10, 6, 0, 26])


def inspector_text(name: str = "bf16") -> str:
    """What TensorRT's inspector said of a real engine."""
    return gzip.decompress((TEXTS / f"{name}.json.gz").read_bytes()).decode()


def write_plan(path: Path, content: bytes = b"layers") -> Path:
    """A file that begins as a plan does."""
    path.write_bytes(MAGIC + bytes(20) + VERSION + content)
    return path


def write_engine(
    folder: Path, *, content: bytes = b"layers", name: str = "engine", plain: bool = False
) -> Path:
    """A plan of the bundled model with the sidecar that `divergence build` would write."""
    onnx = folder / f"{name}.onnx"
    demo.write_bundled("clean", onnx)
    _, _, found, _ = OnnxProbe(onnx).locate()
    graph = Graph(read_light(onnx).proto)
    plan = write_plan(folder / f"{name}.plan", content)
    beside = write_plan(folder / f"{name}.plain.plan", content + b" plain") if plain else None
    sidecar = Sidecar(
        plan_digest=digest_of(plan),
        model=str(onnx),
        model_digest="0",
        precision="fp32",
        options={"precision": "fp32"},
        built={"tensorrt": "10.6.0", "gpu": "NVIDIA H100", "platform": "Linux x86_64"},
        outputs=tuple(Output.of(f) for f in found),
        own_outputs=tuple(graph.outputs),
        plain=beside.name if beside else None,
        plain_digest=digest_of(beside) if beside else None,
        nodes=tuple(nodes_to_json(describe_nodes(graph))),
        warnings=("ModelImporter.cpp:429: Make sure input input_ids has Int64 binding.",),
        seconds=12.5,
    )
    sidecar.save(plan)
    return plan


class StandIn:
    """Answers as the worker does.

    Args:
        folder: where `write_engine` put the ONNX model.
        gain: by which layer 1's value projection is scaled, where the plan's content ends in `changed`.
        noise: added to the tensors that it gives, relative.
        facts: what to answer otherwise than a healthy engine.
        plain_noise: added to those of the plain engine.
    """

    def __init__(
        self,
        folder: Path,
        *,
        gain: float = 1.02,
        noise: float = 0.0,
        plain_noise: float = 0.0,
        facts: Mapping[str, Any] | None = None,
        only: tuple[str, ...] = (),
    ) -> None:
        self.folder = folder
        self.gain = gain
        self.noise = noise
        self.plain_noise = plain_noise
        self.facts = dict(facts or {})
        self.only = only
        self.requests: list[Mapping[str, Any]] = []
        _, _, self.found, _ = OnnxProbe(next(folder.glob("*.onnx"))).locate()

    def call(
        self, job: str, request: Mapping[str, Any], *, about: str, progress: Progress = silent
    ) -> dict[str, Any]:
        """See `Worker.call`."""
        self.requests.append({"job": job, **request})
        progress("running the engine", 0, 0)
        if job.endswith(":describe"):
            return self._answer(self._tensors(demo.inputs(tokens=4), ""), built=True)
        inputs = load_file(request["inputs"])
        for name in demo.INPUTS:
            if name not in inputs:
                raise InputError(f"{about}: the engine's inputs {name} are missing")
        tensors = self._tensors(inputs, request["plan"])
        save_file(tensors, request["outputs"])
        return self._answer(tensors)

    def _tensors(self, inputs: Mapping[str, torch.Tensor], plan: str) -> dict[str, torch.Tensor]:
        model = demo.load()
        changed = plan and Path(plan).read_bytes().endswith(b"changed")
        seen: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            if changed:
                model.layers[1].self_attn.v_proj.weight.mul_(self.gain)  # type: ignore[union-attr,operator]
            outputs = model(inputs["input_ids"], inputs["attention_mask"])
            seen = {**outputs, **_sites(model, inputs, self.found)}
        noise = self.plain_noise if ".plain" in plan else self.noise
        generator = torch.Generator().manual_seed(0)
        noisy = {
            name: t + noise * t.abs().mean() * torch.randn(t.shape, generator=generator)
            for name, t in seen.items()
            if not self.only or name in self.only
        }
        return {name: t.contiguous() for name, t in noisy.items()}

    def _answer(self, tensors: Mapping[str, torch.Tensor], *, built: bool = False) -> dict[str, Any]:
        """The facts; with `built` those of an engine that was not run, whose sizes are open."""
        io = [{"name": n, "input": True, "dtype": "int64", "shape": [1, -1]} for n in demo.INPUTS]
        io += [
            {
                "name": n,
                "input": False,
                "dtype": "float32",
                "shape": [-1] * t.dim() if built else list(t.shape),
            }
            for n, t in tensors.items()
        ]
        return {
            "machine": {
                "tensorrt": "10.6.0",
                "gpu": "NVIDIA H100",
                "compute": "9.0",
                "platform": "Linux x86_64",
            },
            "host": "torch",
            "io": io,
            "notes": [],
            "load_s": 0.4,
            "latency_ms": 1.25,
            "runs": 2,
            "varying": {},
            "unwritten": {},
            "hazards": None,
            "inspector": inspector_text(),
            "warnings": [],
            "debug": [],
            **self.facts,
        }


def _sites(
    model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], found: tuple[Found, ...]
) -> dict[str, torch.Tensor]:
    """The bundled model's sites under the ONNX names that the sidecar maps."""
    from divergence.probes.pytorch import PyTorchProbe

    names = {f.site: f.value for f in found}
    seen: dict[str, torch.Tensor] = {}

    def sink(observation: Any) -> None:
        if observation.site in names:
            seen[names[observation.site]] = observation.tensor.clone()

    PyTorchProbe(model).run(inputs, sink)
    return seen
