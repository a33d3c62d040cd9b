"""The bundled model, its inputs, and its exports to ONNX: what `divergence demo` runs on.

`load()` is the reference. `write_bundled("clean", PATH)` passes against it, and
`write_bundled("rotary-bf16", PATH)` fails at layers.0.key; neither needs the exporter.
`export(PATH, value_gain={3: 1.02})` plants any other fault, through torch's exporter.
"""

from divergence.demo.bundle import BUNDLED, write_bundled
from divergence.demo.export import INPUTS, OUTPUTS, export, inputs, load, planted
from divergence.demo.model import DemoConfig, DemoDecoder

__all__ = [
    "BUNDLED",
    "INPUTS",
    "OUTPUTS",
    "DemoConfig",
    "DemoDecoder",
    "export",
    "inputs",
    "load",
    "planted",
    "write_bundled",
]
