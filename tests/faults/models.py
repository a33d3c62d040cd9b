"""Decoders to plant faults into: Llama, Gemma and GPT-2 style, each operator with a switch to run it wrong.

Written apart from the bundled model and from transformers, with other names and other forms of output, so
that nothing which looks for faults can lean on any one model class. Everything follows from a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.faults.operators import CHANNEL, Norm, Rotary, Shape, projection, turn, views

VOCABULARY = 211
POSITIONS = 256


class Attention(nn.Module):
    """Grouped-query attention.

    Attributes:
        factor: what scores are multiplied with.
        kind: as `Shape.attention`.
        softmax: dtype of scores and probabilities; fp32 if None.
        layout: of the rotary embedding, `halves` or `pairs`.
        ahead: how many later tokens a query may see.
        blind: whether the mask is left out.
        stale: whether the second call reads keys and values of the first.
    """

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        super().__init__()
        self.heads, self.groups, self.size = shape.heads, shape.groups, shape.head_dim
        self.fused = shape.style == "gpt2"
        widths = [self.heads * self.size, self.groups * self.size, self.groups * self.size]
        bias = shape.bias or self.fused
        if self.fused:
            self.wqkv = projection(shape.hidden, sum(widths), generator, bias=bias)
        else:
            self.wq, self.wk, self.wv = (projection(shape.hidden, w, generator, bias=bias) for w in widths)
        rows, _ = self.part("query")
        rows.mul_(shape.sharpness)
        self.wo = projection(widths[0], shape.hidden, generator, gain=0.5, bias=self.fused)
        self.rotary = Rotary(self.size) if shape.rotary == "inside" and not self.fused else None
        self.factor, self.kind, self.softmax = self.size**-0.5, str(shape.attention), torch.float32
        self.layout, self.ahead, self.blind, self.stale = "halves", 0, False, False
        self.kept: tuple[Tensor, Tensor] | None = None

    def part(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Views of the weight and bias of query, key, value or output."""
        if name == "output" or not self.fused:
            module = {"query": "wq", "key": "wk", "value": "wv", "output": "wo"}[name]
            return views(getattr(self, module))
        width = self.heads * self.size
        start = ("query", "key", "value").index(name) * width
        return self.wqkv.weight.data[start : start + width], self.wqkv.bias.data[start : start + width]

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = self.wqkv(x).chunk(3, -1) if self.fused else (self.wq(x), self.wk(x), self.wv(x))
        query, key, value = (t.unflatten(-1, (-1, self.size)).transpose(1, 2) for t in flat)
        return query, key, value

    def forward(
        self, x: Tensor, turns: tuple[Tensor, Tensor] | None, positions: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output `[batch, seq, hidden]`, and key and value `[batch, group, seq, head_dim]` as cached."""
        query, key, value = self._heads(x)
        if self.rotary is not None:
            turns = self.rotary(positions, x.dtype)
        if turns is not None:
            query, key = (turn(t, *turns, self.layout) for t in (query, key))
        if self.stale and self.kept is not None:
            key, value = self.kept
        self.kept = (key, value)
        repeat = self.heads // self.groups
        mixed = self._mix(query, key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1), mask)
        result: Tensor = self.wo(mixed.transpose(1, 2).flatten(2))
        return result, key, value

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        seq = query.shape[2]
        if self.kind == "sdpa-causal" and mask is None and not self.ahead and not self.blind:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.factor)
        if mask is None:
            mask = additive(torch.ones(1, seq, dtype=torch.bool), "lowest", query.dtype)
        if self.ahead:
            near = torch.ones(seq, seq, dtype=torch.bool).tril(self.ahead).triu(1)
            mask = mask.masked_fill(near, 0.0)
        if self.blind:
            mask = torch.zeros_like(mask)
        if self.kind != "explicit":
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.factor)
        scores: Tensor = (query @ key.transpose(-1, -2) * self.factor + mask).to(self.softmax)
        return scores.softmax(-1).to(value.dtype) @ value


class FeedForward(nn.Module):
    """down(f(gate(x)) * up(x)), or down(f(up(x))) without a gate; `activation` is f."""

    def __init__(self, shape: Shape, generator: torch.Generator, extra: float) -> None:
        super().__init__()
        plain = shape.style == "gpt2"
        self.w1 = None if plain else projection(shape.hidden, shape.inner, generator)
        self.w3 = projection(shape.hidden, shape.inner, generator, bias=plain)
        self.w2 = projection(shape.inner, shape.hidden, generator, gain=0.5, bias=plain or extra != 0)
        if extra and self.w2.bias is not None:
            self.w2.bias.zero_()[CHANNEL] = extra
        self.activation = "silu" if shape.style == "llama" else "gelu-tanh"

    def part(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Views of the weight and bias of gate, up or down."""
        found = {"gate": self.w1, "up": self.w3, "down": self.w2}[name]
        assert found is not None
        return views(found)

    def _f(self, x: Tensor) -> Tensor:
        if self.activation == "gelu-tanh":
            return F.gelu(x, approximate="tanh")
        kinds: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
        return kinds[self.activation](x)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[batch, seq, hidden]` to the same shape."""
        inner = self.w3(x)
        result: Tensor = self.w2(self._f(inner) if self.w1 is None else self._f(self.w1(x)) * inner)
        return result


class Block(nn.Module):
    """Attention and feed-forward, each on the normalised residual stream and added to it.

    Attributes:
        noise: added to the output, in units of each token's standard deviation.
    """

    def __init__(self, shape: Shape, layer: int, generator: torch.Generator) -> None:
        super().__init__()
        self.norm1 = Norm(shape, generator, layer)
        self.mixer = Attention(shape, generator)
        self.norm2 = Norm(shape, generator, layer)
        self.feed = FeedForward(shape, generator, dict(shape.massive).get(layer, 0.0))
        self.bare = shape.outputs == "hidden"
        self.noise: Tensor | None = None

    def part(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Views of the weight and bias of a projection (`PARTS`), to be written into."""
        return (self.feed if name in {"gate", "up", "down"} else self.mixer).part(name)

    def forward(
        self, x: Tensor, turns: tuple[Tensor, Tensor] | None, positions: Tensor, mask: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The block's output `[batch, seq, hidden]`; with key and value where the model returns them."""
        mixed, key, value = self.mixer(self.norm1(x), turns, positions, mask)
        x = x + mixed
        x = x + self.feed(self.norm2(x))
        if self.noise is not None:
            x = x + (self.noise * x.float().std(-1, keepdim=True)).to(x.dtype)
        return x if self.bare else (x, key, value)


class Decoder(nn.Module):
    """The decoder.

    Attributes:
        masking: `lowest` adds the lowest finite number, `inf` minus infinity, `product` (1 - seen) times
            -1e9 in the model's own dtype, `weak` -3: too little to hide anything.
        counted: whether positions count valid tokens; else they count all, padding too.
        swapped: whether keys and values are handed out under each other's name.
        misread: (written, read): dtypes through which the bits of keys and values pass on the way out.
        compute: dtype of the activations; that of the embedding if None.
    """

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        self.shape = shape
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            self._build(shape, torch.Generator().manual_seed(seed))
        self.masking, self.counted, self.swapped = "lowest", True, False
        self.misread: tuple[torch.dtype, torch.dtype] | None = None
        self.compute: torch.dtype | None = None

    def _build(self, shape: Shape, generator: torch.Generator) -> None:
        spread = shape.scale * (shape.hidden**-0.5 if shape.style == "gemma" else 1.0)
        table = spread * torch.randn(VOCABULARY, shape.hidden, generator=generator)
        start = shape.massive_before(0) * spread / shape.scale
        table[:, CHANNEL] += start
        self.tokens = nn.Embedding(VOCABULARY, shape.hidden, _weight=table)
        places = 0.3 * shape.scale * torch.randn(POSITIONS, shape.hidden, generator=generator)
        self.places = nn.Embedding(POSITIONS, shape.hidden, _weight=places) if shape.style == "gpt2" else None
        outside = shape.rotary == "outside" and shape.style != "gpt2"
        self.rotary = Rotary(shape.head_dim) if outside else None
        self.blocks = nn.ModuleList(Block(shape, n, generator) for n in range(shape.layers))
        self.last = Norm(shape, generator, shape.layers)

    def block(self, layer: int) -> Block:
        """A block by its index."""
        found = self.blocks[layer]
        assert isinstance(found, Block)
        return found

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """Runs the decoder on ids and a mask (1 valid, 0 padding), both int64 `[batch, seq]`."""
        valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        count = valid.cumsum(-1) - 1 if self.counted else torch.arange(valid.shape[1]).expand_as(valid)
        positions = count.clamp(min=0)
        x = self.tokens(input_ids)
        x = x if self.compute is None else x.to(self.compute)
        if self.shape.style == "gemma":
            x = x * self.shape.hidden**0.5
        if self.places is not None:
            x = x + self.places(positions).to(x.dtype)
        turns = None if self.rotary is None else self.rotary(positions, x.dtype)
        mask = None
        if self.shape.attention != "sdpa-causal" or attention_mask is not None or self.masking != "lowest":
            mask = additive(valid.bool(), self.masking, x.dtype)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        start = x
        for call in range(self.shape.calls):
            x = start if call == 0 else start + 0.5 * self.last(x)
            for layer in range(self.shape.layers):
                block = self.block(layer)
                block.mixer.kept = block.mixer.kept if call else None
                found = block(x, turns, positions, mask)
                x, key, value = found if isinstance(found, tuple) else (found, x, x)
                keys.append(key)
                values.append(value)
        return {**self._cache(keys, values), "last_hidden_state": self.last(x)}

    def _cache(self, keys: list[Tensor], values: list[Tensor]) -> Mapping[str, Tensor]:
        if self.misread is not None:
            written, read = self.misread
            keys, values = ([t.to(written).view(read).to(t.dtype) for t in ts] for ts in (keys, values))
        if self.swapped:
            keys, values = values, keys
        if self.shape.outputs == "stacked":
            return {"keys": torch.stack(keys, 1), "values": torch.stack(values, 1)}
        if self.shape.outputs == "interleaved":
            return {"present": torch.stack([torch.stack(pair) for pair in zip(keys, values, strict=True)])}
        if self.shape.outputs == "all":
            named = {f"key_{n}": key for n, key in enumerate(keys)}
            return named | {f"value_{n}": value for n, value in enumerate(values)}
        return {}


def additive(valid: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """What to add to the scores, `[batch, 1, seq, seq]`, for valid tokens `[batch, seq]`; `kind` as
    `Decoder.masking`."""
    seq = valid.shape[1]
    seen = torch.ones(seq, seq, dtype=torch.bool).tril() & valid[:, None, None, :]
    if kind == "product":
        return (1.0 - seen.to(dtype)) * torch.tensor(-1e9).to(dtype)
    low = {"lowest": torch.finfo(dtype).min, "inf": -torch.inf, "weak": -3.0}[kind]
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, low)
