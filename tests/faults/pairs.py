"""What a pair is: a reference, a candidate, inputs, and what is true of the candidate.

`Pair.build(seed)` makes a pair anew; seed 0 is the one that the tests and the table use, and any other seed
draws other weights, layers and parameters of the same faults.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from divergence.probes import Observation
from divergence.probes.fake import FakeProbe
from divergence.probes.pytorch import PyTorchProbe
from tests.faults.models import VOCABULARY, Decoder
from tests.faults.operators import Norm, Shape
from tests.faults.planting import Fault, Planted

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A pair, ready to compare.

    Attributes:
        reference, candidate: what `divergence.compare` takes.
        inputs: by name.
        truth: what was planted, in execution order; nothing in a clean pair.
        options: further arguments of `divergence.compare`.
    """

    reference: Any
    candidate: Any
    inputs: Mapping[str, Tensor]
    truth: tuple[Planted, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """What the comparison has to say."""
        return "fail" if self.truth else "pass"


@dataclass(frozen=True)
class Pair:
    """A named recipe.

    Attributes:
        name: of the fault and of the model around it.
        build: makes the pair from a seed.
        slow: takes more than a second or two.
    """

    name: str
    build: Callable[[int], Case]
    slow: bool = False


@dataclass(frozen=True)
class Setting:
    """How the candidate runs, and on what.

    Attributes:
        precision: of the candidate; `bf16-stored` keeps weights in bf16 and computes in fp32.
        declared: what the comparison is told of it, if anything.
        opaque: only the model's `outputs` are seen, as of an engine, or only the `hidden` states of layers.
        batch, seq: of the inputs.
        padding: side on which the first row is padded, or "" for none.
        exclude: sites that are not compared.
    """

    precision: Literal["fp32", "fp16", "bf16", "bf16-stored"] = "fp32"
    declared: str = ""
    opaque: Literal["", "outputs", "hidden"] = ""
    batch: int = 1
    seq: int = 64
    padding: Literal["", "left", "right"] = ""
    exclude: tuple[str, ...] = ()


def stored(model: nn.Module, precision: str) -> nn.Module:
    """`model` with its parameters in `precision`; norms stay in fp32, as they do in careful exports."""
    dtype = DTYPES.get(precision.removesuffix("-stored"))
    if dtype is None:
        return model
    for module in model.modules():
        if isinstance(module, Norm):
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        if isinstance(module, Decoder) and precision.endswith("-stored"):
            module.compute = torch.float32
    return model


def inputs_of(setting: Setting, draw: np.random.Generator) -> dict[str, Tensor]:
    """Ids, and a mask where there is padding."""
    ids = torch.from_numpy(draw.integers(0, VOCABULARY, (setting.batch, setting.seq)))
    if not setting.padding:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    padded = setting.seq // 4
    if setting.padding == "left":
        mask[0, :padded] = 0
    else:
        mask[0, -padded:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def pair(name: str, shape: Shape, fault: Fault, setting: Setting | None = None, **change: Any) -> Pair:
    """A pair of decoders; `change` are fields of `Setting`."""
    how = replace(setting or Setting(), **change)

    def build(seed: int) -> Case:
        draw = np.random.default_rng([zlib.crc32(name.encode()), seed])
        reference = Decoder(shape, int(draw.integers(1 << 31))).eval()
        inputs = inputs_of(how, draw)
        with torch.no_grad():
            candidate, truth = fault(reference, draw)
        candidate = stored(candidate.eval(), how.precision)
        options: dict[str, Any] = {"precision": how.declared} if how.declared else {}
        if how.exclude:
            options["exclude"] = how.exclude
        if how.opaque == "outputs":
            return Case(reference, outputs_of(candidate, inputs), inputs, truth, options)
        if how.opaque == "hidden":
            # Whatever is wrong within a layer shows in its output first.
            truth = tuple(replace(t, site=re.sub("key|value", "hidden", t.site)) for t in truth)
            return Case(reference, hidden_of(candidate, inputs), inputs, truth, options)
        return Case(reference, candidate, inputs, truth, options)

    return Pair(name, build)


def outputs_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> FakeProbe:
    """What `model` gives out, and nothing of what is in it."""
    with torch.inference_mode():
        outputs = model(**inputs)
    return FakeProbe({f"output.{name}": tensor for name, tensor in outputs.items()}, source="opaque")


def hidden_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> FakeProbe:
    """The output of every layer of `model`, and the model's own."""
    seen: dict[str, Tensor] = {}

    def keep(observation: Observation) -> None:
        if observation.site.tensor not in {"key", "value"}:
            seen[str(observation.site)] = observation.tensor.clone()

    PyTorchProbe(model).run(inputs, keep)
    return FakeProbe(seen, source="hidden states")
