"""The bundled model, its inputs, and its exports to ONNX: what `divergence demo` runs on.

    model = load()                                          the reference
    export("clean.onnx")                                    passes
    export("faulty.onnx", rotary_dtype=torch.bfloat16)      fails at layers.0.key
"""

from divergence.demo.export import INPUTS, OUTPUTS, export, inputs, load, planted
from divergence.demo.model import DemoConfig, DemoDecoder

__all__ = ["INPUTS", "OUTPUTS", "DemoConfig", "DemoDecoder", "export", "inputs", "load", "planted"]
