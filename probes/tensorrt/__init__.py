"""TensorRT engines: built, run and read in a process of their own.

Nothing in the calling process imports TensorRT or touches CUDA: jobs go to a worker, so that an abort
or a segfault of the library becomes an error message.

options.py    how engines are run
probe.py      `TensorRTProbe`: describes and runs
build.py      builds engines whose sites can be seen
sidecar.py    the map beside an engine
outputs.py    which tensors of an engine are sites
plan.py       what a plan file says of itself
inspector.py  the engine inspector's text as data
process.py    the worker process, as its owner sees it

In the worker, and nowhere else:

worker.py     serves jobs
device.py     whether there is a CUDA device
engine.py     runs and reads engines
builder.py    builds them
hosts.py      how a program runs an engine
hazards.py    what such a program forgets to wait for
"""

from typing import Any

__all__ = ["TensorRTProbe"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for, so that the worker and the command line load only what they need.
    if name == "TensorRTProbe":
        from divergence.probes.tensorrt.probe import TensorRTProbe

        return TensorRTProbe
    raise AttributeError(name)
