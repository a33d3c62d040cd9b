"""Formats for captures: time to write and to read 256 MiB, size, and whether bf16 survives.

Run it with zarr and polygraphy installed to have them measured too. Every figure is the median of
three; files are read from the page cache, so that formats and not disks are compared.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from divergence.captures import open_capture
from divergence.probes import Observation, RunFacts
from divergence.recording import CaptureWriter
from divergence.sites import Site

MIB = 1 << 20
LAYERS = 32
# 32 layers of 8 MiB; normal deviates do not compress, as activations do not.
SHAPE = (1, 1024, 4096)
REPEATS = 3

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Format:
    """How to write tensors to a path and read all their bytes back."""

    name: str
    write: Callable[[Tensors, Path], None]
    read: Callable[[Path], Tensors]


def _write_capture(tensors: Tensors, path: Path) -> None:
    with CaptureWriter(path) as writer:
        for name, tensor in tensors.items():
            writer(Observation(Site.parse(name), tensor))
        writer.close(RunFacts("fake", "fake", ""), "")


def _read_capture(path: Path) -> Tensors:
    capture = open_capture(path)
    return {str(site): capture.tensor(site).clone() for site in capture.sites}


def _write_npz(tensors: Tensors, path: Path) -> None:
    arrays: dict[str, Any] = {name: _as_numpy(tensor) for name, tensor in tensors.items()}
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _read_npz(path: Path) -> Tensors:
    with np.load(path) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


def _write_zarr(tensors: Tensors, path: Path) -> None:
    import zarr

    group = zarr.open_group(str(path), mode="w")
    for name, tensor in tensors.items():
        array = _as_numpy(tensor)
        group.create_array(name, data=array, chunks=array.shape)


def _read_zarr(path: Path) -> Tensors:
    import zarr

    group = zarr.open_group(str(path), mode="r")
    return {name: torch.from_numpy(np.asarray(array[...])) for name, array in group.arrays()}


def _write_polygraphy(tensors: Tensors, path: Path) -> None:
    from polygraphy.json import save_json

    save_json({name: _as_numpy(tensor) for name, tensor in tensors.items()}, str(path))


def _read_polygraphy(path: Path) -> Tensors:
    from polygraphy.json import load_json

    return {name: torch.from_numpy(np.array(array)) for name, array in load_json(str(path)).items()}


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy()  # raises TypeError for bf16, which is the point


def _formats() -> list[Format]:
    formats = [
        Format("safetensors shards, manifest", _write_capture, _read_capture),
        Format("npz", _write_npz, _read_npz),
        Format("torch.save", torch.save, lambda path: torch.load(path, weights_only=True)),
    ]
    if importlib.util.find_spec("zarr"):
        formats.append(Format("zarr", _write_zarr, _read_zarr))
    if importlib.util.find_spec("polygraphy"):
        formats.append(Format("polygraphy JSON", _write_polygraphy, _read_polygraphy))
    return formats


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _measure(form: Format, tensors: Tensors, folder: Path) -> tuple[float, float, float]:
    """Median seconds to write, median seconds to read, MiB on disk."""
    written, read = [], []
    path = folder / "file"
    for _ in range(REPEATS):
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
        start = time.perf_counter()
        form.write(tensors, path)
        middle = time.perf_counter()
        found = form.read(path)
        read.append(time.perf_counter() - middle)
        written.append(middle - start)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    return statistics.median(written), statistics.median(read), _size(path) / MIB


def main() -> None:
    """Prints one line a format and dtype."""
    print(f"{os.cpu_count()} CPUs, {LAYERS} tensors, 256 MiB")
    print(f"{'format':30} {'dtype':9} {'write s':>8} {'read s':>8} {'MiB':>7}")
    for dtype in (torch.float16, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        tensors = {
            f"layers.{layer}.hidden": torch.randn(SHAPE, generator=generator).to(dtype)
            for layer in range(LAYERS)
        }
        name = str(dtype).removeprefix("torch.")
        for form in _formats():
            with tempfile.TemporaryDirectory() as folder:
                try:
                    write, read, size = _measure(form, tensors, Path(folder))
                except TypeError as error:
                    print(f"{form.name:30} {name:9} {error}")
                else:
                    print(f"{form.name:30} {name:9} {write:8.2f} {read:8.2f} {size:7.0f}")


if __name__ == "__main__":
    main()
