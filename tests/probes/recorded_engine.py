"""Real texts of the engine inspector in tests/data, and descriptions of the ONNX nodes behind them.

The engines were built from exports of a gated decoder with grouped queries and a rotary embedding. The
model here has the same structure at a small width; `python -m tests.probes.recorded_engine` exports it
and writes the descriptions beside the recordings. The exporter numbers what it takes apart (`node_Sqrt_13`)
and its casts by counts that move with its version: such names are set to those of the recording, in order.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from divergence.probes.onnx.graph import Graph
from divergence.probes.onnx.nodes import NodeInfo, describe_nodes, nodes_from_json, nodes_to_json
from divergence.probes.tensorrt.inspector import EngineText, parse_inspector
from tests.smollm2 import quiet

DATA = Path(__file__).parents[1] / "data" / "tensorrt" / "inspector"
HEADS, HEAD_DIM, HIDDEN, INNER, TOKENS = 8, 8, 64, 128, 16
# Recording: layers, strongly typed in fp16, positions as an input.
RECORDINGS = {
    "scale-fp16": (18, False, True),
    "scale-typed_fp16": (18, True, True),
    "bf16": (8, False, False),
}
_NUMBERED = re.compile(r"^node_([A-Z][A-Za-z]*|_to_copy)_(\d+)$")


def engine(name: str) -> EngineText:
    """The recorded text called `name`."""
    return parse_inspector(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()).decode())


def nodes(name: str) -> tuple[NodeInfo, ...]:
    """Descriptions of the ONNX nodes of the recording called `name`."""
    packed = (DATA / f"{name}.nodes.json.gz").read_bytes()
    return nodes_from_json(json.loads(gzip.decompress(packed)))


class Norm(nn.Module):
    """RMSNorm with a gain of 1 + weight, in float32 throughout where `typed`."""

    def __init__(self, *, typed: bool) -> None:
        super().__init__()
        self.weight, self.typed = nn.Parameter(torch.zeros(HIDDEN)), typed

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() if self.typed else x
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (y * (1.0 + self.weight.float())).to(x.dtype) if self.typed else y * (1.0 + self.weight)


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(HIDDEN, HEAD_DIM, bias=False)
        self.v_proj = nn.Linear(HIDDEN, HEAD_DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, _ = x.shape
        q = self.q_proj(x).view(batch, tokens, HEADS, HEAD_DIM).transpose(1, 2)
        k = self.k_proj(x).view(batch, tokens, 1, HEAD_DIM).transpose(1, 2)
        v = self.v_proj(x).view(batch, tokens, 1, HEAD_DIM).transpose(1, 2)
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        keys, values = (t.expand(batch, HEADS, tokens, HEAD_DIM) for t in (k, v))
        scores = torch.matmul(q, keys.transpose(2, 3)) * HEAD_DIM**-0.5 + mask
        mixed = torch.matmul(torch.softmax(scores, -1), values)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, -1)), k, v


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x)
        down: Tensor = self.down_proj(gated)
        return down


class Layer(nn.Module):
    def __init__(self, *, typed: bool) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(typed=typed), Norm(typed=typed)
        self.self_attn, self.mlp = Attention(), Mlp()

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attended, k, v = self.self_attn(self.input_layernorm(x), mask, cos, sin)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), k, v


class Decoder(nn.Module):
    """What the recorded engines run, but for its width."""

    def __init__(self, layers: int, *, typed: bool) -> None:
        super().__init__()
        self.typed = typed
        self.layers = nn.ModuleList(Layer(typed=typed) for _ in range(layers))
        self.inv_freq = nn.Buffer(10000.0 ** -(torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM))

    def forward(self, x: Tensor, mask: Tensor, pos: Tensor | None = None) -> tuple[Tensor, ...]:
        inv_freq: Tensor = self.inv_freq
        if pos is None:
            pos = torch.arange(TOKENS)
        else:
            inv_freq = 1.0 / (10000.0 ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM))
        angles = pos.float()[:, None] * inv_freq[None, :]
        angles = torch.cat((angles, angles), -1)
        cos, sin = angles.cos(), angles.sin()
        if self.typed:
            cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        out: list[Tensor] = []
        for layer in self.layers:
            x, k, v = layer(x, mask, cos, sin)
            out += [k, v, x]
        return tuple(out)


def described(layers: int, *, typed: bool, positions: bool) -> tuple[NodeInfo, ...]:
    """Exports a decoder and describes its nodes."""
    dtype = torch.float16 if typed else torch.float32
    given = [
        torch.zeros(1, TOKENS, HIDDEN, dtype=dtype),
        torch.zeros(1, 1, TOKENS, TOKENS, dtype=dtype),
        torch.arange(TOKENS),
    ]
    given = given if positions else given[:2]
    names = ["x", "mask", "pos"][: len(given)]
    model = Decoder(layers, typed=typed).to(dtype).eval()
    with quiet():
        program = torch.onnx.export(
            model, tuple(given), input_names=names, dynamo=True, opset_version=18, verbose=False
        )
    assert program is not None
    return describe_nodes(Graph(program.model_proto))


def renumbered(found: Iterable[NodeInfo], wanted: Iterable[str]) -> tuple[NodeInfo, ...]:
    """`found` with the numbers of `wanted` in the names that the exporter numbers by a count."""
    names: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name in set(wanted):
        if match := _NUMBERED.match(name):
            names[match[1]].append((int(match[2]), name))
    queues = {op: iter(sorted(numbered)) for op, numbered in names.items()}
    renamed = []
    for node in found:
        match = _NUMBERED.match(node.name)
        number = next(queues.get(match[1], iter(())), None) if match else None
        renamed.append(node if number is None else replace(node, name=number[1]))
    return tuple(renamed)


def main() -> None:
    for name, (layers, typed, positions) in RECORDINGS.items():
        wanted = {node for layer in engine(name).layers for node in layer.onnx_nodes}
        found = renumbered(described(layers, typed=typed, positions=positions), wanted)
        text = json.dumps(nodes_to_json(found), separators=(",", ":"))
        (DATA / f"{name}.nodes.json.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
        missing = wanted - {node.name for node in found}
        print(
            f"{name}: {len(found)} nodes, {len(missing)} of the engine's are missing: {sorted(missing)[:5]}"
        )


if __name__ == "__main__":
    main()
