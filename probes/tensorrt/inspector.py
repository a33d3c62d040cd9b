"""Reads what TensorRT's engine inspector says of an engine.

The text is that of `IEngineInspector.get_engine_information(LayerInformationFormat.JSON)` for an
engine built with profiling verbosity DETAILED. Nothing of TensorRT is needed to read it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from divergence.errors import SourceError

# Coarse words of tensor formats ("Row major linear FP16 format") and the word for each type that the
# inspector itself uses elsewhere. Longer ones stand before those that they contain.
_WORDS: tuple[tuple[str, str], ...] = (
    ("bfloat16", "BFloat16"),
    ("bf16", "BFloat16"),
    ("half", "Half"),
    ("fp16", "Half"),
    ("float16", "Half"),
    ("tf32", "TF32"),
    ("fp32", "Float"),
    ("float32", "Float"),
    ("fp8", "FP8"),
    ("float8", "FP8"),
    ("e4m3", "FP8"),
    ("e5m2", "FP8"),
    ("fp4", "FP4"),
    ("float64", "Double"),
    ("double", "Double"),
    ("uint8", "UInt8"),
    ("int64", "Int64"),
    ("int32", "Int32"),
    ("int8", "Int8"),
    ("int4", "Int4"),
    ("bool", "Bool"),
    ("float", "Float"),
)
FLOATING = frozenset({"Double", "Float", "TF32", "Half", "BFloat16", "FP8", "FP4"})
INTEGRAL = frozenset({"Int64", "Int32", "Int8", "UInt8", "Int4", "Bool"})

_TYPES: Mapping[str, str] = {
    "f64": "Double",
    "f32": "Float",
    "tf32": "TF32",
    "bf16": "BFloat16",
    "f16": "Half",
    "e4m3": "FP8",
    "e5m2": "FP8",
    "i32": "Int32",
    "s32": "Int32",
    "i8": "Int8",
    "s8": "Int8",
    "u8": "UInt8",
    "i4": "Int4",
    "s4": "Int4",
}
_TYPE = "|".join(sorted(_TYPES, key=len, reverse=True))
_GEMM = re.compile(rf"gemm_({_TYPE})({_TYPE})_({_TYPE})({_TYPE})_({_TYPE})(?=_|$)")
_ATTENTION = re.compile(r"_mha(?:_|$)|fmha|multi_?head_?attention", re.IGNORECASE)
_NUMBER = re.compile(r"_myl\d+_\d+$")
_HASH = re.compile(r"_0x[0-9a-f]{16,}$")
_GENERATED = "__myl_"
_OPERATION = re.compile(r"[A-Z][a-z0-9]*")
_SEPARATORS = re.compile(r"[\x1e\x1f]")
_ONNX = "[ONNX Layer: "


@dataclass(frozen=True)
class EngineTensor:
    """What a layer of an engine reads or writes.

    Attributes:
        name: its name; that of the binding where it is an input or output of the engine.
        dtype: `Float`, `Half`, `BFloat16`, `FP8`, `Int8`, `Int64`, ...; as written where unknown,
            empty where it is not given.
        dims: its sizes.
    """

    name: str
    dtype: str
    dims: tuple[int, ...] = ()

    @property
    def floating(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.dtype in FLOATING


@dataclass(frozen=True)
class GemmTypes:
    """The types that the name of a GEMM tactic states.

    `..._gemm_f16f16_f16f32_f32_...` reads: both operands, output and accumulator, epilogue. Which of
    the middle two is the output is seen where they differ: the output tensor is Half there. A middle
    `tf32` is no output: it says that the operands are rounded to TF32.

    Attributes:
        operands: types of the two operands as stored.
        precision: type in which they are multiplied: that of the operands, or `TF32`.
        accumulator: type in which products are summed.
        output: type of the result.
        epilogue: type in which scale, bias and activation are applied.
    """

    operands: tuple[str, str]
    precision: str
    accumulator: str
    output: str
    epilogue: str


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine: what runs as one kernel, or a few.

    Attributes:
        name: its name.
        kind: `kgen` (generated kernel), `gemm`, `fusion`, `Reformat`, `shape_call`, ...
        inputs, outputs: what it reads and writes.
        tactic: name of the kernel that was chosen; empty where none is given.
        onnx_nodes: names of the ONNX nodes that went into it, without repetitions.
    """

    name: str
    kind: str = ""
    inputs: tuple[EngineTensor, ...] = ()
    outputs: tuple[EngineTensor, ...] = ()
    tactic: str = ""
    onnx_nodes: tuple[str, ...] = ()

    @cached_property
    def kernel(self) -> str:
        """What tells the kind of kernel: the tactic without its hash and tile sizes, or the name of the
        layer without its number."""
        gemm = _GEMM.search(self.tactic)
        if gemm is not None:
            return self.tactic[: gemm.end()]
        return _HASH.sub("", self.tactic) or _NUMBER.sub("", self.name)

    @cached_property
    def gemm(self) -> GemmTypes | None:
        """The types of its GEMM, or None where its tactic does not state any."""
        return parse_tactic(self.tactic)

    @cached_property
    def is_attention(self) -> bool:
        """Whether it is a fused attention (`_gemm_mha_v2`)."""
        return bool(_ATTENTION.search(self.kernel))

    @cached_property
    def operations(self) -> tuple[str, ...]:
        """The operations that the name of a generated kernel spells out, in order: `__myl_ResMulAdd`
        -> `Res`, `Mul`, `Add`. A long name ends in `Etc`. Empty for other layers."""
        stem = _NUMBER.sub("", self.name)
        if not stem.startswith(_GENERATED):
            return ()
        return tuple(_OPERATION.findall(stem.removeprefix(_GENERATED)))


@dataclass(frozen=True)
class EngineText:
    """All that the inspector says of an engine.

    Attributes:
        layers: layers in order of execution.
        bindings: names of inputs and outputs of the engine.
    """

    layers: tuple[EngineLayer, ...]
    bindings: tuple[str, ...] = ()


def parse_tactic(tactic: str) -> GemmTypes | None:
    """The types that the name of a GEMM tactic states; None where it does not state them."""
    match = _GEMM.search(tactic)
    if match is None:
        return None
    a, b, output, accumulator, epilogue = (_TYPES[word] for word in match.groups())
    rounded = output == "TF32"
    precision = "TF32" if rounded else a if a == b else f"{a} x {b}"
    return GemmTypes((a, b), precision, accumulator, a if rounded else output, epilogue)


def parse_inspector(text: str, source: str = "the engine") -> EngineText:
    """Reads the JSON text of the engine inspector.

    Args:
        text: what the inspector returned for the whole engine.
        source: what errors call the engine.

    Raises:
        SourceError: it is no JSON, or says nothing of layers, or only their names.
    """
    try:
        found = json.loads(text, strict=False)
    except json.JSONDecodeError as error:
        raise SourceError(
            f"{source}: the inspector's text is not JSON (line {error.lineno}, column {error.colno}: "
            f"{error.msg}); it may have been cut off: take it again from the engine"
        ) from None
    layers = found.get("Layers") if isinstance(found, dict) else None
    if not isinstance(layers, list):
        raise SourceError(
            f"{source}: the inspector's text has no list 'Layers'; take the information of the whole engine"
        )
    if not layers or not all(isinstance(layer, dict) for layer in layers):
        what = "names of layers only" if layers else "no layers"
        raise SourceError(
            f"{source}: the inspector shows {what}; build with profiling verbosity DETAILED "
            "(`divergence build` does) to see types and tactics"
        )
    bindings = found.get("Bindings")
    names = tuple(str(name) for name in bindings) if isinstance(bindings, list) else ()
    return EngineText(tuple(_layer(layer) for layer in layers), names)


def split_metadata(metadata: str) -> tuple[str, ...]:
    """Names of the ONNX nodes in a layer's metadata, without repetitions.

    Entries `[ONNX Layer: name]` are separated by the character 0x1f, those of nodes that were merged
    before by 0x1e. Entries of other kinds are left out.
    """
    entries = (entry.strip() for entry in _SEPARATORS.split(metadata))
    names = (e.removeprefix(_ONNX).removesuffix("]") for e in entries if e.startswith(_ONNX))
    return tuple(dict.fromkeys(name for name in names if name))


def word(dtype: str) -> str:
    """The inspector's word for a type, whether given as `Half`, `float16` or within a format."""
    lowered = dtype.lower()
    return next((found for part, found in _WORDS if part in lowered), dtype)


def _layer(found: Mapping[str, Any]) -> EngineLayer:
    return EngineLayer(
        name=_text(found, "Name"),
        kind=_text(found, "LayerType"),
        inputs=_tensors(found.get("Inputs")),
        outputs=_tensors(found.get("Outputs")),
        tactic=_text(found, "TacticName"),
        onnx_nodes=split_metadata(_text(found, "Metadata")),
    )


def _text(found: Mapping[str, Any], key: str) -> str:
    value = found.get(key)
    return value if isinstance(value, str) else ""


def _tensors(found: Any) -> tuple[EngineTensor, ...]:
    if not isinstance(found, list):
        return ()
    tensors = []
    for item in found:
        if isinstance(item, dict):
            dims = item.get("Dimensions")
            sizes = tuple(n for n in dims if isinstance(n, int)) if isinstance(dims, list) else ()
            tensors.append(EngineTensor(_text(item, "Name"), word(_text(item, "Format/Datatype")), sizes))
    return tuple(tensors)
