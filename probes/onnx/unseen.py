"""Tells whether an Inf in an fp16 value is real.

onnxruntime computes fp16 additions, products and the like in fp32 and drops the roundings between
them. A value that is exposed is rounded on the way out, and may show Inf that nothing in the graph
ever saw. An Inf is real only if a consumer shows it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from divergence.probes.onnx.graph import Graph

# Results of these on Inf are not finite, wherever the Inf stands.
_ELEMENTWISE = frozenset(
    {"Add", "Sub", "Mul", "Cast", "Identity", "Neg", "Abs", "Sqrt", "Pow", "Exp", "Dropout"}
)
_REDUCING = frozenset({"MatMul", "Gemm", "FusedMatMul", "Conv", "ReduceMean", "ReduceSum", "ReduceMax",
                       "ReduceL2", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization",
                       "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Softmax",
                       "Attention", "MultiHeadAttention", "GroupQueryAttention"})  # fmt: skip
_MOVING = frozenset({"Transpose", "Reshape", "Unsqueeze", "Squeeze", "Expand"})
_FAR = 6

Fetch = Callable[[Sequence[str]], Iterable[Mapping[str, torch.Tensor]]]


def unseen_infinities(graph: Graph, values: Iterable[str], fetch: Fetch) -> dict[str, str]:
    """The values among `values`, which hold Inf, whose Inf no consumer saw, with the reason.

    Args:
        graph: the graph.
        values: names of fp16 values that hold Inf.
        fetch: runs the graph with the named values as outputs and yields their tensors.
    """
    infinite = list(dict.fromkeys(values))
    asked = list(dict.fromkeys(name for value in infinite for name in (value, *_downstream(graph, value))))
    masks: dict[str, torch.Tensor] = {}
    for group in fetch(asked):
        for name, tensor in group.items():
            if tensor.is_floating_point():
                masks[name] = ~torch.isfinite(tensor)
    reasons = {}
    for value in infinite:
        finite = _finite_consumers(graph, value, masks, _FAR)
        if finite:
            names = ", ".join(finite[:2]) + (f" and {len(finite) - 2} more" if len(finite) > 2 else "")
            reasons[value] = (
                f"{names}, which reads it, is finite where it is Inf: onnxruntime computes this fp16 value "
                "in fp32, and only handing it out rounds it to Inf."
            )
    return reasons


def _downstream(graph: Graph, value: str) -> list[str]:
    """What is computed from `value`, through elementwise operators and one other beyond them."""
    found: dict[str, None] = {}
    level = [value]
    for _ in range(_FAR):
        reached = []
        for name in level:
            for index in graph.consumers(name):
                node = graph.nodes[index]
                if not node.output or node.output[0] in found:
                    continue
                found[node.output[0]] = None
                if node.op_type in _ELEMENTWISE | _MOVING:
                    reached.append(node.output[0])
        level = reached
    return list(found)


def _finite_consumers(graph: Graph, value: str, masks: Mapping[str, torch.Tensor], depth: int) -> list[str]:
    """Names of the operators that prove the Inf in `value` unseen; empty if it was seen, or if
    nothing proves anything (a Tanh of Inf is finite in any case)."""
    if value in graph.outputs or depth == 0:
        return []
    proof: list[str] = []
    for index in graph.consumers(value):
        node = graph.nodes[index]
        mask = masks.get(node.output[0]) if node.output else None
        if mask is None or node.op_type not in _ELEMENTWISE | _REDUCING | _MOVING:
            continue
        shown = bool(mask.any())
        if node.op_type in _ELEMENTWISE and mask.shape == masks[value].shape:
            shown = bool((mask & masks[value]).any())
        if not shown:
            proof.append(f"{node.op_type} {node.name or node.output[0]}")
            continue
        # An elementwise result may itself show an Inf that nobody sees.
        further = (
            _finite_consumers(graph, node.output[0], masks, depth - 1)
            if node.op_type in _ELEMENTWISE | _MOVING and graph.element_type(node.output[0]) == _FP16
            else []
        )
        if not further:
            return []
        proof += further
    return list(dict.fromkeys(proof))


_FP16 = 10
