"""The probe of ONNX models.

probe.py      `OnnxProbe`: describes and runs
light.py      reads a model without its weights
graph.py      who makes a value, who reads it, its type and shape
names.py      sites that output names declare
scopes.py     modules and layers, from what exporters leave on nodes
calls.py      calls of a layer that runs more than once
layers.py     sites of a layer, from its scopes
attention.py  query, key and value, from the data flow
scaling.py    keys before or after the model's own scaling
values.py     sites by their contents
patterns.py   sites by the operators around them
cuts.py       outputs of layers by where the graph is narrow
outputs.py    the model's own outputs
own_keys.py   keys and values that the graph hands out
mapping.py    puts the sites together
session.py    runs a graph with more outputs
inputs.py     checks inputs
unseen.py     Inf that nothing in the graph saw
facts.py      digest, precision, operators
weights.py    weights by the names of their modules
"""

from typing import Any

__all__ = ["OnnxProbe"]


def __getattr__(name: str) -> Any:
    # onnxruntime is loaded for who runs models, not for who reads graphs.
    if name == "OnnxProbe":
        from divergence.probes.onnx.probe import OnnxProbe

        return OnnxProbe
    raise AttributeError(name)
