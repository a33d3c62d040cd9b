"""The role that every node of an ONNX graph plays, by the structure around it and its module.

Fused operators say what they are. What exporters take apart is put together again: a norm from its
mean and root, a rotary embedding from its sine or its rotated half, an attention from its softmax,
an MLP from the activation between two products.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from divergence.probes.onnx.attention import products_around
from divergence.probes.onnx.graph import Graph
from divergence.probes.onnx.walk import ACTIVATIONS, MOVEMENT, MOVES, PRODUCTS, Walk

_NORMS = re.compile(r"Norm(alization)?$")
_ROTARY = frozenset({"RotaryEmbedding", "GemmaRotaryEmbedding"})
_ATTENTIONS = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedMultiHeadAttention",
                         "QAttention", "PagedAttention"})  # fmt: skip
_POINTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Neg", "Exp", "Sqrt", "Clip", "Min", "Max", "Cast",
                        "Where", "Identity", "Dropout"}) | ACTIVATIONS  # fmt: skip
_HALVES = frozenset({"Neg", "Slice", "Split", "Squeeze", "Unsqueeze", "Gather", "Cast"})
_ROOTS = frozenset({"Sqrt", "Reciprocal", "Div", "Pow", "Rsqrt"})

_IN_MLP = re.compile(
    r"(^|[._])(mlp|ffn|ff|feed_?forward|fc_?\d|experts?|gate_proj|up_proj|down_proj|c_fc|wi|wi_\d|wo|"
    r"intermediate|dense_h_to_4h|dense_4h_to_h)([._]|\d|$)",
    re.IGNORECASE,
)
_IN_ATTENTION = re.compile(r"attn|attention|[qkvo]_proj|c_attn|query_key_value", re.IGNORECASE)
_NORM_MODULE = re.compile(r"norm|(^|_)ln(_|\d|$)", re.IGNORECASE)
_ACT_MODULE = re.compile(
    r"(^|_)(act|act_fn|activation|activation_fn|gelu|silu|relu|nonlinearity)\d*$", re.IGNORECASE
)
_ROTARY_MODULE = re.compile(r"rotary|rope", re.IGNORECASE)
_EMBEDDING_MODULE = re.compile(r"embed|^w[tp]e$", re.IGNORECASE)
_FAR = 12


def find_roles(graph: Graph, layers: Iterable[int]) -> list[str]:
    """The role of each node of `graph`, one of `ROLES`.

    Args:
        graph: the graph.
        layers: indices of the nodes that lie in layers: sums outside of them are no residuals.
    """
    finder = _Roles(graph)
    finder.declared()
    finder.attentions()
    finder.rotary()
    finder.norms()
    finder.products()
    finder.embeddings()
    finder.residuals(frozenset(layers))
    finder.modules()
    finder.casts()
    return [role or "other" for role in finder.roles]


class _Roles(Walk):
    """Gives roles; a role once given is kept, so that the surest rules go first."""

    def declared(self) -> None:
        """Operators that are one thing only."""
        for index, node in enumerate(self.graph.nodes):
            kind = node.op_type
            if kind in _ROTARY:
                self.give(index, "rotary")
            elif kind in _ATTENTIONS:
                self.give(index, "attention_product")
            elif kind in ("Softmax", "LogSoftmax"):
                self.give(index, "softmax")
            elif _NORMS.search(kind):
                self.give(index, "norm")

    def attentions(self) -> None:
        """Both products around a softmax, what scales and masks the scores, and what makes the mask."""
        for index in range(len(self.roles)):
            if self.op(index) == "Softmax":
                scores, weighted = products_around(self.graph, index)
                if scores is not None and weighted is not None:
                    self._attention(scores, index, weighted)
            elif self.op(index) in _ATTENTIONS:
                place = 3 if self.graph.nodes[index].domain in ("", "ai.onnx") else 5
                if self.op(index) != "GroupQueryAttention":
                    self._mask_above(list(self.graph.nodes[index].input[place : place + 1]))

    def _attention(self, scores: int, softmax: int, weighted: int) -> None:
        self.give(scores, "attention_product")
        self.give(weighted, "attention_product")
        for at in self._between(scores, softmax):
            if self.op(at) in ("Cast", "Sub") and softmax in self.readers(at):
                self.give(at, "softmax")
                continue
            others = [n for n in self.graph.nodes[at].input if n and not self._comes_from(n, scores)]
            masks = [n for n in others if not self.scalar(n)]
            masking = self.op(at) in ("Add", "Where") and bool(masks)
            self.give(at, "mask" if masking else "attention_product")
            if masking:
                self._mask_above(masks)
        for at in self._between(softmax, weighted):
            self.give(at, "softmax")
        for at in (scores, weighted):  # scaled operands: SDPA splits its scale between query and key
            for source in self.sources(at):
                node = self.graph.nodes[source]
                if node.op_type in ("Mul", "Div") and any(self.scalar(n) for n in node.input):
                    self.give(source, "attention_product")

    def _between(self, first: int, last: int) -> list[int]:
        """The nodes on paths from `first` to `last`."""
        near = range(first + 1, last)
        above = self.reach([last], self.sources, lambda at: at in near)
        below = self.reach([first], self.readers, lambda at: at in near)
        return sorted(above & below)

    def _comes_from(self, name: str, index: int) -> bool:
        start = self.graph.producer(name)
        if start is None or start < index:
            return False
        return start == index or index in self.reach([start], self.sources, lambda at: at >= index)

    def _mask_above(self, names: list[str]) -> None:
        made = [at for name in names if name and (at := self.graph.producer(name)) is not None]
        for at in {*made, *self.reach(made, self.sources, lambda at: not self.roles[at])}:
            self.give(at, "mask")

    def rotary(self) -> None:
        """Angles with their sine and cosine, and the rotation; by sine and cosine, or, where the
        exporter has folded these, by the rotated half of which one part is negated."""
        turned = {
            at for i, n in enumerate(self.graph.nodes) if n.op_type == "Neg" for at in self._rotation(i)
        }
        for at in turned:
            self.give(at, "rotary")
        waves = [i for i, n in enumerate(self.graph.nodes) if n.op_type in ("Sin", "Cos")]
        for wave in waves:
            below = self.reach([wave], self.readers, self._is_wave_path)
            rotates = not turned or bool(below & turned) or bool(set(self._beyond(below | {wave})) & turned)
            role = "rotary" if rotates else "embedding"
            above = self.reach([wave], self.sources, lambda at: self.op(at) in _ANGLE)
            for at in {wave, *above, *below}:
                if at == wave or self._only_leads_to(at, role, waves) or at in below:
                    self.give(at, role)

    def _is_wave_path(self, index: int) -> bool:
        if self.roles[index]:
            return False
        node = self.graph.nodes[index]
        scaling = node.op_type in ("Mul", "Div") and any(self.scalar(n) for n in node.input)
        return node.op_type in MOVES or scaling

    def _beyond(self, nodes: Iterable[int]) -> list[int]:
        return [reader for at in nodes for reader in self.readers(at)]

    def _only_leads_to(self, index: int, role: str, waves: list[int]) -> bool:
        """Whether all that node `index` makes ends in sines and cosines."""
        below = self.reach([index], self.readers, lambda at: self.op(at) in _ANGLE)
        ends = {at for at in self._beyond({index, *below}) if at not in below}
        return bool(ends) and all(at in waves or self.roles[at] in (role, "rotary") for at in ends)

    def _rotation(self, negation: int) -> Iterator[int]:
        """The nodes of a rotation in which `negation` turns one half: x * cos + concat(-x2, x1) * sin."""
        joined = [at for at in self._steps(negation, MOVES - {"Concat"}) if self.op(at) == "Concat"]
        for concat in joined:
            halves = self.reach([concat], self.sources, lambda at: self.op(at) in _HALVES)
            for times_sin in self._steps(concat, MOVES):
                if self.op(times_sin) != "Mul":
                    continue
                sums = [at for at in self.readers(times_sin) if self.op(at) in ("Add", "Sub", "Cast")]
                for total in sums:
                    products = [at for at in self.sources(total) if self.op(at) == "Mul"]
                    yield from (negation, concat, times_sin, total, *products)
                    yield from halves

    def _steps(self, start: int, through: frozenset[str]) -> set[int]:
        """Readers of `start`, those behind nodes of the kinds `through` included."""
        inner = self.reach([start], self.readers, lambda at: self.op(at) in through)
        return inner | set(self._beyond(inner | {start}))

    def norms(self) -> None:
        """Decomposed norms: a mean whose root divides what it was taken of."""
        for index, node in enumerate(self.graph.nodes):
            if node.op_type != "ReduceMean" or self.roles[index]:
                continue
            down = self.reach([index], self.readers, self._is_root_path)
            if not any(self.op(at) in _ROOTS for at in down):
                continue
            source = self.reach([index], self.sources, self._is_square_path)
            scaled = [at for at in self._beyond(down) if self.op(at) in ("Mul", "Div")]
            affine = [at for i in scaled for at in self._affine(i)]
            for at in (index, *source, *down, *scaled, *affine):
                self.give(at, "norm")

    def _is_root_path(self, index: int) -> bool:
        node = self.graph.nodes[index]
        if node.op_type == "Add":
            return any(self.scalar(n) for n in node.input)
        return (
            node.op_type in _ROOTS
            and (node.op_type != "Div" or self.constant(node.input[0]))
            and (node.op_type != "Pow" or self.constant(node.input[1]))
        )

    def _is_square_path(self, index: int) -> bool:
        node = self.graph.nodes[index]
        if node.op_type == "Mul":
            return len(set(node.input)) == 1
        return node.op_type == "Pow" or (
            node.op_type in ("Sub", "ReduceMean", "Cast") and not self.roles[index]
        )

    def _affine(self, index: int) -> Iterator[int]:
        """What follows a normalised value: its type, gain and bias."""
        at: int | None = index
        while at is not None:
            readers = self.readers(at)
            at = None
            for reader in readers:
                node = self.graph.nodes[reader]
                gain = node.op_type in ("Mul", "Add") and any(self.constant(n) for n in node.input)
                if not self.roles[reader] and (gain or node.op_type == "Cast"):
                    yield reader
                    at = reader
                    break

    def products(self) -> None:
        """Products with weights: those around an activation are the MLP's, the others projections."""
        weighted = [
            i
            for i, node in enumerate(self.graph.nodes)
            if node.op_type in PRODUCTS and not self.roles[i] and any(self.constant(n) for n in node.input)
        ]
        inside = {i for i in weighted if self._in_mlp(i)}
        for last in weighted:
            region = self.reach([last], self.sources, self._is_pointwise)
            active = {at for at in region if self.op(at) in ACTIVATIONS}
            if not active or _IN_ATTENTION.search(self._inner(last)):
                continue
            first = {at for i in region for at in self.sources(i) if at in weighted}
            inside |= {last, *(at for at in first if not _IN_ATTENTION.search(self._inner(at)))}
            self._activations(region, active, first)
        for index in weighted:
            role = "mlp" if index in inside else "projection"
            self.give(index, role)
            for at in self.readers(index):
                node = self.graph.nodes[at]
                if node.op_type == "Add" and self._has_bias(at):
                    self.give(at, role)

    def _is_pointwise(self, index: int) -> bool:
        return not self.roles[index] and self.op(index) in _POINTWISE | {
            "Reshape",
            "Split",
            "Slice",
            "Transpose",
        }

    def _activations(self, region: set[int], active: set[int], products: set[int]) -> None:
        """Of what stands between the products of an MLP: the activation, and what joins its halves."""
        sources = {end for at in active for end in self._ends(self.graph.nodes[at].output[0], region)}
        for at in sorted(region):
            node = self.graph.nodes[at]
            ends = [self._ends(name, region) for name in node.input if name and not self.constant(name)]
            joins = node.op_type == "Mul" and len({frozenset(e) for e in ends}) > 1
            if joins or (node.op_type == "Add" and self._has_bias(at)):
                self.give(at, "mlp")
            elif at in active or (node.op_type not in MOVEMENT and products):
                self.give(at, "activation" if sources.intersection(*ends) else "mlp")

    def _ends(self, name: str, region: set[int]) -> set[str]:
        """The values that enter a region of pointwise nodes and reach `name`; halves of a split count
        as different ones."""
        ends: set[str] = set()
        todo, seen = [name], {name}
        while todo:
            value = todo.pop()
            at = self.graph.producer(value)
            if at is None:
                continue
            if at not in region or self.op(at) in ("Split", "Slice"):
                ends.add(value)
                continue
            fresh = [n for n in self.graph.nodes[at].input if n and n not in seen and not self.constant(n)]
            seen.update(fresh)
            todo.extend(fresh)
        return ends

    def _has_bias(self, index: int) -> bool:
        return any(self.constant(n) and not self.scalar(n) for n in self.graph.nodes[index].input)

    def _inner(self, index: int) -> str:
        return ".".join((self.graph.scopes[index] or "").split(".")[-2:])

    def _in_mlp(self, index: int) -> bool:
        inner = self._inner(index)
        return bool(_IN_MLP.search(inner)) and not _IN_ATTENTION.search(inner)

    def embeddings(self) -> None:
        """Rows taken from a table of floats, and the sum of two such."""
        for index, node in enumerate(self.graph.nodes):
            table = node.op_type == "Gather" and self.constant(node.input[0])
            if table and self.graph.is_float(node.input[0]) and self.graph.rank(node.input[0]) == 2:
                self.give(index, "embedding")
        for index in range(len(self.roles)):
            direct = self.sources(index)
            found = [at for i in direct for at in (self.sources(i) if self.op(i) == "Cast" else [i])]
            made = [self.roles[at] for at in found if self.op(at) != "Constant"]
            if self.op(index) in ("Add", "Mul") and made and set(made) == {"embedding"}:
                self.give(index, "embedding")

    def residuals(self, layers: frozenset[int]) -> None:
        """Sums of two values of one shape, both computed from the inputs."""
        for index, node in enumerate(self.graph.nodes):
            if node.op_type != "Add" or self.roles[index] or (layers and index not in layers):
                continue
            both = all(not self.constant(n) and (self.graph.rank(n) or 3) >= 2 for n in node.input)
            if both and self.graph.is_float(node.output[0]):
                self.give(index, "residual")

    def modules(self) -> None:
        """What structure leaves open, by the name of the innermost module."""
        for index in range(len(self.roles)):
            if self.roles[index] or self.op(index) in ("Constant", "Shape"):
                continue
            leaf = self.leaf(index)
            computes = self.op(index) not in MOVEMENT
            if _ROTARY_MODULE.search(leaf):
                self.give(index, "rotary")
            elif computes and _ACT_MODULE.search(leaf):
                self.give(index, "activation")
            elif computes and _NORM_MODULE.search(leaf):
                self.give(index, "norm")
            elif computes and _EMBEDDING_MODULE.search(leaf):
                self.give(index, "embedding")
            elif self.op(index) in PRODUCTS:
                self.give(index, "attention_product" if _IN_ATTENTION.search(leaf) else "projection")
            elif computes and self._in_mlp(index):
                self.give(index, "mlp")

    def casts(self) -> None:
        """A change of type belongs to what reads it, or else to what made it."""
        for index in reversed(range(len(self.roles))):
            if self.op(index) != "Cast" or self.roles[index]:
                continue
            readers = {self.roles[at] for at in self.readers(index)} - {"", "other"}
            sources = {self.roles[at] for at in self.sources(index)} - {"", "other"}
            near = readers if len(readers) == 1 else sources
            if len(near) == 1:
                self.give(index, near.pop())


_ANGLE = MOVES | {"Mul", "MatMul", "Gemm", "Add", "Div", "Gather", "Range", "Einsum"}
