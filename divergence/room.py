"""Room for models: whether the reference's weights and a candidate's fit into memory together."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING

from divergence.probes.tensorrt.device import device_size
from divergence.sources import MODEL_SUFFIXES, is_engine, settings_of

if TYPE_CHECKING:
    from divergence.config import Config
    from divergence.probes.pytorch import PyTorchProbe

SHARE = 0.8
"""Of the memory that is free, what a candidate's weights may take: the rest is for what it computes."""

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def host_memory() -> int | None:
    """Bytes of host memory that are free for this process, its container's limit counted; None where the
    system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    for limit, used in _CGROUPS:
        try:
            held = int(Path(used).read_text()) - _cache_beside(Path(used))
            free = min(free, int(Path(limit).read_text()) - held)
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return max(0, free)


def _cache_beside(used: Path) -> int:
    """Bytes of files in a container's memory that it gives up when memory is wanted; they count as used."""
    try:
        lines = used.with_name("memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def device_memory() -> int:
    """Bytes of memory that are free on the current CUDA device."""
    import torch

    return torch.cuda.mem_get_info()[0]


def weights_of(source: object, config: Config) -> int | None:
    """Bytes of weights that a source will load, None where that cannot be told before: an ONNX file with
    the files beside it that are named after it, or an engine."""
    settings = settings_of(source, config)
    if settings is None or settings.path is None:
        return None
    path = Path(settings.path)
    if path.suffix not in MODEL_SUFFIXES:
        return None
    try:
        beside = path.parent.glob(f"{path.stem}*") if path.suffix == ".onnx" else [path]
        return sum(file.stat().st_size for file in beside if file.is_file() and file.suffix != ".capture")
    except OSError:
        return None


def fits_twice(source: object, config: Config) -> bool:
    """Whether a candidate may be loaded before the reference, which is taken to be as large: in host memory,
    and an engine on its device too."""
    size, settings = weights_of(source, config), settings_of(source, config)
    if size is None:
        return True
    rooms = [host_memory()]
    if settings is not None and is_engine(settings):
        rooms.append(device_size())
    return all(room is None or 2 * size <= SHARE * room for room in rooms)


def make_room(reference: PyTorchProbe, source: object, config: Config) -> bool:
    """Lets go of the reference's weights if they and the candidate's do not fit into memory together, and
    the reference can be loaded again.

    Args:
        reference: after its run.
        source: the candidate.
        config: that its name refers to.

    Returns:
        Whether there are no weights now.
    """
    settings = settings_of(source, config)
    if not reference.loaded or settings is None:
        return not reference.loaded
    on_device = reference.on_cuda
    size = reference.nbytes if settings.model is not None else weights_of(source, config)
    if size is None or (settings.model is None and is_engine(settings) != on_device):
        return False
    free = device_memory() if on_device else host_memory()
    if free is None or size <= SHARE * free or not reference.release():
        return False
    gc.collect()
    if on_device:
        import torch

        torch.cuda.empty_cache()
    return True
