"""Walks over an ONNX graph along its data, on which roles are given to nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from divergence.probes.onnx.graph import Graph

ROLES = (
    "rotary", "norm", "attention_product", "softmax", "projection", "mlp", "activation", "residual",
    "embedding", "mask", "other",
)  # fmt: skip

PRODUCTS = frozenset({"MatMul", "Gemm", "FusedMatMul", "MatMulInteger", "QLinearMatMul", "MatMulNBits",
                      "Einsum", "Conv", "QGemm", "GemmFloat8"})  # fmt: skip
ACTIVATIONS = frozenset({"Gelu", "FastGelu", "QuickGelu", "BiasGelu", "Erf", "Tanh", "Sigmoid", "Relu",
                         "LeakyRelu", "Elu", "Selu", "Celu", "HardSwish", "HardSigmoid", "Mish", "Softplus",
                         "Swish", "PRelu"})  # fmt: skip
# What moves elements, changes their type or makes shapes: it computes nothing.
MOVEMENT = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Concat", "Expand",
                      "Tile", "Identity", "Flatten", "Cast", "CastLike", "Shape", "Size", "Gather",
                      "GatherND", "Constant", "ConstantOfShape", "Range", "Pad", "Dropout"})  # fmt: skip
MOVES = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Concat", "Expand",
                    "Tile", "Identity", "Cast"})  # fmt: skip


def depends_on_inputs(graph: Graph) -> list[bool]:
    """For each node whether its result depends on what an input of the graph holds, not only on its
    shape; an engine for fixed shapes computes the others when it is built."""
    inputs = set(graph.inputs)
    dynamic: list[bool] = []
    made: dict[str, bool] = {}
    for node in graph.nodes:
        depends = node.op_type not in ("Shape", "Size", "Constant") and any(
            made.get(name, name in inputs) for name in node.input if name
        )
        dynamic.append(depends)
        made.update(dict.fromkeys(node.output, depends))
    return dynamic


class Walk:
    """A graph and the role given to each of its nodes; empty where none is given.

    Attributes:
        graph: the graph.
        roles: the role of each node.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.roles: list[str] = [""] * len(graph.nodes)
        self._dynamic = depends_on_inputs(graph)

    def give(self, index: int, role: str) -> None:
        """Gives node `index` a role, unless it has one."""
        self.roles[index] = self.roles[index] or role

    def op(self, index: int) -> str:
        """The operator of node `index`."""
        return str(self.graph.nodes[index].op_type)

    def sources(self, index: int) -> list[int]:
        """The nodes that make what node `index` reads."""
        made = (self.graph.producer(name) for name in self.graph.nodes[index].input if name)
        return [at for at in made if at is not None]

    def readers(self, index: int) -> list[int]:
        """The nodes that read what node `index` makes."""
        return [at for name in self.graph.nodes[index].output for at in self.graph.consumers(name)]

    def leaf(self, index: int) -> str:
        """The last component of the path of the module of node `index`."""
        return (self.graph.scopes[index] or "").rsplit(".", 1)[-1]

    def reach(
        self, start: Iterable[int], step: Callable[[int], list[int]], through: Callable[[int], bool]
    ) -> set[int]:
        """All nodes reached from `start`, itself left out, by `step` through nodes that pass `through`."""
        seen: set[int] = set()
        level = list(start)
        while level:
            level = [at for i in level for at in step(i) if at not in seen and through(at)]
            level = list(dict.fromkeys(level))
            seen.update(level)
        return seen

    def scalar(self, name: str) -> bool:
        """Whether the value `name` is a single number."""
        return self.graph.size(name) == 1 or self.graph.is_scalar(name)

    def constant(self, name: str) -> bool:
        """Whether the value `name` depends on no input."""
        at = self.graph.producer(name)
        return name in self.graph.initializers or (at is not None and not self._dynamic[at])
