"""Reads an ONNX file without its weights.

`onnx.load` copies every weight several times. Here the file is mapped and its protobuf encoding is
walked: what is small is copied, and of a large initializer only where its bytes lie. The result is
a light `ModelProto` whose large initializers are external data in the file they came from, which
onnxruntime then maps itself.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import onnx
import onnx.inliner
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import GraphProto, ModelProto, TensorProto

from divergence.errors import SourceError, one_line

# Shape constants stay in the graph, where shape inference can see them.
_SMALL = 4096
_LFS = b"version https://git-lfs"

# Numbers of fields in onnx.proto.
_MODEL_FIELDS = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 14, 20, 25, 26})
_MODEL_GRAPH = 7
_GRAPH_INITIALIZER = 5
_TENSOR_FLOAT_DATA = 4
_TENSOR_RAW_DATA = 9

_Buffer = mmap.mmap | bytes


class _MalformedError(Exception):
    """The bytes are not what they should be."""


class _TruncatedError(_MalformedError):
    """The bytes end too early."""


@dataclass(frozen=True)
class _Field:
    """One field of an encoded message: its number, wire type, and where it and its payload lie."""

    number: int
    wire: int
    start: int
    payload: int
    end: int


@dataclass(frozen=True)
class Weight:
    """Where the bytes of an initializer lie."""

    file: Path
    offset: int
    length: int


@dataclass(frozen=True)
class LightModel:
    """An ONNX model whose large initializers stay in their files.

    Attributes:
        path: the file, with symbolic links resolved.
        proto: the model; external locations are relative to `root`.
        weights: the initializers that are not in `proto`, by name.
        root: the folder that external locations are relative to.
    """

    path: Path
    proto: ModelProto
    weights: dict[str, Weight]
    root: Path


def read_light(path: Path) -> LightModel:
    """Reads the ONNX file at `path`.

    Raises:
        SourceError: there is no such file, it is not ONNX or cut off, or a file of external data
            is missing or too short.
    """
    if path.is_dir():
        raise SourceError(f"{path}: a folder; name the ONNX file in it")
    if not path.is_file():
        raise SourceError(f"{path}: no such ONNX file; check the path or export the model again")
    resolved = path.resolve()
    root = Path(resolved.anchor)
    size = resolved.stat().st_size
    if size == 0:
        raise SourceError(f"{path}: the file is empty; export the model again")
    weights: dict[str, Weight] = {}
    with open(resolved, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[: len(_LFS)] == _LFS:
            raise SourceError(f"{path}: a Git LFS pointer, not the model; fetch it with `git lfs pull`")
        try:
            proto = ModelProto.FromString(_light_model(data, resolved, root, weights))
            _check_names(proto.graph)
        except _TruncatedError as error:
            raise SourceError(
                f"{path}: the ONNX file is cut off after {size} bytes; copy or export it again"
            ) from error
        except (_MalformedError, DecodeError) as error:
            raise SourceError(
                f"{path}: not an ONNX file ({one_line(error)}); give the file that torch.onnx.export wrote"
            ) from error
    if proto.functions:
        proto = onnx.inliner.inline_local_functions(proto)
    for tensor in _external(proto.graph):
        if tensor.name not in weights:
            weight = _located(path, tensor)
            if weight.length <= _SMALL:
                _embed(tensor, weight)
            else:
                weights[tensor.name] = weight
                _refer(tensor, weight, root)
    return LightModel(resolved, proto, weights, root)


def _light_model(data: _Buffer, path: Path, root: Path, weights: dict[str, Weight]) -> bytes:
    parts: list[bytes] = []
    has_graph = False
    for field in _fields(data, 0, len(data), _MODEL_FIELDS):
        if field.number == _MODEL_GRAPH and field.wire == 2:
            graph = _light_graph(data, field, path, root, weights)
            parts += [_key(_MODEL_GRAPH), _encode(len(graph)), graph]
            has_graph = True
        else:
            parts.append(data[field.start : field.end])
    if not has_graph:
        raise _MalformedError("it holds no graph")
    return b"".join(parts)


def _light_graph(data: _Buffer, graph: _Field, path: Path, root: Path, weights: dict[str, Weight]) -> bytes:
    parts: list[bytes] = []
    for field in _fields(data, graph.payload, graph.end):
        tensor = None
        if field.number == _GRAPH_INITIALIZER and field.end - field.payload > _SMALL:
            tensor = _light_tensor(data, field, path, root, weights)
        if tensor is None:
            parts.append(data[field.start : field.end])
        else:
            parts += [_key(_GRAPH_INITIALIZER), _encode(len(tensor)), tensor]
    return b"".join(parts)


def _light_tensor(
    data: _Buffer, field: _Field, path: Path, root: Path, weights: dict[str, Weight]
) -> bytes | None:
    """The encoded initializer with its contents replaced by their place, or None if it has none."""
    kept: list[bytes] = []
    content: _Field | None = None
    for part in _fields(data, field.payload, field.end):
        # Packed floats are the same bytes as raw ones.
        if part.wire == 2 and part.number in (_TENSOR_RAW_DATA, _TENSOR_FLOAT_DATA) and not content:
            content = part
        else:
            kept.append(data[part.start : part.end])
    if content is None or content.end - content.payload <= _SMALL:
        return None
    tensor = TensorProto.FromString(b"".join(kept))
    if content.number == _TENSOR_FLOAT_DATA and tensor.data_type != TensorProto.FLOAT:
        return None
    weight = Weight(path, content.payload, content.end - content.payload)
    weights[tensor.name] = weight
    _refer(tensor, weight, root)
    return bytes(tensor.SerializeToString())


def _refer(tensor: TensorProto, weight: Weight, root: Path) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    place = {
        "location": weight.file.relative_to(root).as_posix(),
        "offset": str(weight.offset),
        "length": str(weight.length),
    }
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)


def _embed(tensor: TensorProto, weight: Weight) -> None:
    with open(weight.file, "rb") as file:
        file.seek(weight.offset)
        tensor.raw_data = file.read(weight.length)
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def _located(path: Path, tensor: TensorProto) -> Weight:
    """Where the external data of `tensor` lies, checked."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    location = PurePosixPath(place.get("location", "").replace("\\", "/"))
    if location.is_absolute() or ".." in location.parts or not location.parts:
        raise SourceError(
            f"{path}: external data of '{tensor.name}' lies at '{location}', outside the model's folder; "
            "save the model again with its data beside it"
        )
    # A link to a model may lie beside links to its data, or alone.
    folders = dict.fromkeys((path.parent, path.resolve().parent))
    file = next((folder / location for folder in folders if (folder / location).is_file()), None)
    if file is None:
        raise SourceError(
            f"{path}: external data file '{location}' is missing (initializer '{tensor.name}'); "
            f"copy it to {path.parent}"
        )
    offset, length = _extent(path, tensor, place)
    size = file.stat().st_size
    if offset + length > size:
        raise SourceError(
            f"{file}: external data is too short: initializer '{tensor.name}' ends at byte "
            f"{offset + length} of {size}; copy or export it again"
        )
    return Weight(file.resolve(), offset, length)


def _extent(path: Path, tensor: TensorProto, place: Mapping[str, str]) -> tuple[int, int]:
    """Offset and length in bytes of the external data of `tensor`."""
    written = place.get("offset", "0"), place.get("length", "0")
    if not all(number.isdecimal() for number in written):
        raise SourceError(
            f"{path}: external data of '{tensor.name}' has offset '{written[0]}' and length '{written[1]}'; "
            "export the model again"
        )
    offset, length = map(int, written)
    try:
        needed = tensor_bytes(tensor)
    except (KeyError, ValueError, TypeError) as error:
        raise SourceError(
            f"{path}: '{tensor.name}' has the unknown data type {tensor.data_type}; export the model again"
        ) from error
    if length not in (0, needed):
        raise SourceError(
            f"{path}: external data of '{tensor.name}' has {length} bytes, its shape {list(tensor.dims)} "
            f"takes {needed}; export the model again"
        )
    return offset, needed


def tensor_bytes(tensor: TensorProto) -> int:
    """The number of bytes that the contents of `tensor` take."""
    bits = 4
    if tensor.data_type not in {TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1}:
        bits = 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(math.prod(tensor.dims) * bits + 7) // 8


def _check_names(graph: GraphProto) -> None:
    """Raises where a name is no text: protobuf hands out what is not UTF-8 as bytes."""
    names: list[object] = [v.name for v in (*graph.input, *graph.output, *graph.initializer)]
    for node in graph.node:
        names += [node.op_type, node.domain, node.name, *node.input, *node.output]
    names += [text for t in _external(graph) for e in t.external_data for text in (e.key, e.value)]
    if any(isinstance(name, bytes) for name in names):
        raise _MalformedError("a name in its graph is not UTF-8")


def _external(graph: GraphProto) -> Iterator[TensorProto]:
    """Every tensor in `graph` and the graphs in it whose contents are external."""
    for tensor in graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            yield tensor
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t") and attribute.t.data_location == TensorProto.EXTERNAL:
                yield attribute.t
            if attribute.HasField("g"):
                yield from _external(attribute.g)


def _fields(data: _Buffer, start: int, end: int, known: frozenset[int] | None = None) -> Iterator[_Field]:
    """The fields of the message encoded in `data[start:end]`."""
    at = start
    while at < end:
        key, payload = _varint(data, at, end)
        number, wire = key >> 3, key & 7
        if wire not in (0, 1, 2, 5) or number == 0 or (known is not None and number not in known):
            raise _MalformedError(f"unexpected byte {data[at]} at offset {at}")
        if wire == 0:
            _, stop = _varint(data, payload, end)
        elif wire == 2:
            length, payload = _varint(data, payload, end)
            stop = payload + length
        else:
            stop = payload + (8 if wire == 1 else 4)
        if stop > end:
            # A tail that claims more than any file holds is no length but arbitrary bytes.
            raise _TruncatedError("a field ends after its message")
        yield _Field(number, wire, at, payload, stop)
        at = stop


def _varint(data: _Buffer, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise _MalformedError(f"unexpected byte at offset {at}")
    raise _TruncatedError("a number is cut off")


def _encode(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _key(number: int) -> bytes:
    return _encode(number << 3 | 2)
