"""TensorRT engines: built, run and read in a process of their own.

Nothing in the calling process imports TensorRT or touches CUDA: jobs go to a worker
(`process.Worker`), so that an abort or a segfault of the library becomes an error message.
"""

from divergence.probes.tensorrt.probe import TensorRTProbe

__all__ = ["TensorRTProbe"]
