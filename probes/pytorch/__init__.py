"""The PyTorch probe."""

from divergence.probes.pytorch.probe import PyTorchProbe

__all__ = ["PyTorchProbe"]
