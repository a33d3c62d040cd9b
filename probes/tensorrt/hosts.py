"""Hosts: how a program runs an engine. Imported by the worker only.

A host owns the context, the buffers and the streams. What a deployed program does may be tried here:
derive from `TorchHost` or `PycudaHost`, override `upload`, `execute`, `download` or `finish`, and name
it as `--host FILE.py:CLASS`. `hazards.py` looks for what such a program forgets to wait for.
"""

from __future__ import annotations

import abc
import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import tensorrt as trt
import torch

from divergence.errors import SourceError

Stage = Literal["upload", "execute"]

DTYPES: Mapping[Any, torch.dtype] = {
    trt.DataType.FLOAT: torch.float32,
    trt.DataType.HALF: torch.float16,
    trt.DataType.BF16: torch.bfloat16,
    trt.DataType.FP8: torch.float8_e4m3fn,
    trt.DataType.INT8: torch.int8,
    trt.DataType.UINT8: torch.uint8,
    trt.DataType.INT32: torch.int32,
    trt.DataType.INT64: torch.int64,
    trt.DataType.BOOL: torch.bool,
}
"""Types that TensorRT and torch share; no numpy on the way, which lacks half of them."""

DELAY_CYCLES = 100_000_000
"""Of the GPU's clock: about 50 ms, far longer than it takes to enqueue an engine."""

_FILL_BYTES = 256 << 20
_FILLS = 400  # about 50 ms at the memory bandwidth of an H100


@dataclass(frozen=True)
class Slot:
    """A tensor of an engine as one run binds it.

    Attributes:
        name: the engine's name of it.
        is_input: whether the host writes it.
        dtype: of its elements.
        shape: for this run.
        on_host: it is read from host memory (shape tensors).
    """

    name: str
    is_input: bool
    dtype: torch.dtype
    shape: tuple[int, ...]
    on_host: bool

    @property
    def nbytes(self) -> int:
        """Its size; at least one byte, since every tensor needs an address."""
        count = 1
        for size in self.shape:
            count *= size
        return max(1, count * self.dtype.itemsize)


class Host(abc.ABC):
    """Runs one engine on one set of inputs, as often as asked.

    Args:
        load: deserialises the engine, to be called with the host's CUDA context current.
    """

    name = "host"

    def __init__(self, load: Callable[[], trt.ICudaEngine]) -> None:
        self.engine = load()
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise SourceError("TensorRT could not make an execution context: out of device memory?")
        self.slots: tuple[Slot, ...] = ()
        self.pinned: dict[str, torch.Tensor] = {}
        """Host side of every tensor as bytes, page-locked."""

    @abc.abstractmethod
    def allocate(self, slot: Slot) -> int:
        """Makes the device buffer and the page-locked bytes (`pinned`) of a tensor; returns the address."""

    @abc.abstractmethod
    def upload(self) -> None:
        """Copies `pinned` inputs to the device."""

    @abc.abstractmethod
    def execute(self) -> None:
        """Enqueues the engine."""

    @abc.abstractmethod
    def download(self) -> None:
        """Copies outputs from the device to `pinned`."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Waits until the host may read its outputs, as the program does."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Waits for everything on the device."""

    @abc.abstractmethod
    def fill(self, slot: Slot, byte: int) -> None:
        """Fills a device buffer with `byte`."""

    @abc.abstractmethod
    def delay(self, stage: Stage) -> None:
        """Keeps the stream of `stage` busy for some 50 ms."""

    @abc.abstractmethod
    def close(self) -> None:
        """Frees what the host holds."""

    def bind(self, slots: tuple[Slot, ...], inputs: Mapping[str, torch.Tensor]) -> None:
        """Makes the buffers and gives their addresses to the engine."""
        self.slots = slots
        for slot in slots:
            address = self.allocate(slot)
            if slot.on_host:
                address = self.pinned[slot.name].data_ptr()
            if not self.context.set_tensor_address(slot.name, address):
                raise SourceError(f"TensorRT refuses the address of tensor '{slot.name}'")
            if slot.is_input:
                raw = inputs[slot.name].contiguous().reshape(-1).view(torch.uint8)
                self.pinned[slot.name][: raw.numel()].copy_(raw)

    def poison(self, byte: int) -> None:
        """Fills every device buffer, and the host's copy of every output, with `byte`."""
        for slot in self.slots:
            if not slot.on_host:
                self.fill(slot, byte)
            if not slot.is_input:
                self.pinned[slot.name].fill_(byte)
        self.synchronize()

    def outputs(self) -> dict[str, torch.Tensor]:
        """Copies of the outputs as the host reads them now."""
        found = {}
        for slot in self.slots:
            if not slot.is_input:
                size = slot.nbytes if 0 not in slot.shape else 0
                found[slot.name] = self.pinned[slot.name][:size].clone().view(slot.dtype).reshape(slot.shape)
        return found


class TorchHost(Host):
    """Runs the engine on PyTorch's memory and a stream of PyTorch."""

    name = "torch"

    def __init__(self, load: Callable[[], trt.ICudaEngine]) -> None:
        torch.cuda.init()
        super().__init__(load)
        self.stream = torch.cuda.Stream()
        self.upload_stream = self.stream
        self.buffers: dict[str, torch.Tensor] = {}

    def allocate(self, slot: Slot) -> int:
        self.pinned[slot.name] = torch.empty(slot.nbytes, dtype=torch.uint8, pin_memory=True)
        self.buffers[slot.name] = torch.empty(slot.nbytes, dtype=torch.uint8, device="cuda")
        return self.buffers[slot.name].data_ptr()

    def upload(self) -> None:
        with torch.cuda.stream(self.upload_stream):
            for slot in self.slots:
                if slot.is_input and not slot.on_host:
                    self.buffers[slot.name].copy_(self.pinned[slot.name], non_blocking=True)

    def execute(self) -> None:
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise SourceError("TensorRT could not enqueue the engine")

    def download(self) -> None:
        with torch.cuda.stream(self.stream):
            for slot in self.slots:
                if not slot.is_input and not slot.on_host:
                    self.pinned[slot.name].copy_(self.buffers[slot.name], non_blocking=True)

    def finish(self) -> None:
        self.stream.synchronize()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def fill(self, slot: Slot, byte: int) -> None:
        self.buffers[slot.name].fill_(byte)

    def delay(self, stage: Stage) -> None:
        with torch.cuda.stream(self.upload_stream if stage == "upload" else self.stream):
            torch.cuda._sleep(DELAY_CYCLES)  # noqa: SLF001 - there is no public way to be slow

    def close(self) -> None:
        self.buffers.clear()


class PycudaHost(Host):
    """Runs the engine as a program on pycuda does: own stream, `mem_alloc`, page-locked buffers.

    Args:
        load: see `Host`.
        own_context: in a CUDA context of its own, not in the primary one, which PyTorch uses too.
    """

    name = "pycuda"

    def __init__(self, load: Callable[[], trt.ICudaEngine], *, own_context: bool = False) -> None:
        try:
            import pycuda.driver as cuda
        except ImportError as error:
            raise SourceError(
                f"--host pycuda needs pycuda ({error}); pip install 'divergence-debugger[pycuda]'"
            ) from error
        self.cuda = cuda
        cuda.init()
        device = cuda.Device(0)
        self.current = device.make_context() if own_context else device.retain_primary_context()
        if not own_context:
            self.current.push()
        super().__init__(load)
        self.stream = cuda.Stream()
        self.upload_stream = self.stream
        self.buffers: dict[str, Any] = {}
        self._locked: dict[str, Any] = {}
        self._scratch: Any = None

    def allocate(self, slot: Slot) -> int:
        locked = self.cuda.pagelocked_empty(slot.nbytes, "uint8")
        self._locked[slot.name] = locked
        self.pinned[slot.name] = torch.from_numpy(locked)  # bytes: numpy need not know the type
        self.buffers[slot.name] = self.cuda.mem_alloc(slot.nbytes)
        return int(self.buffers[slot.name])

    def upload(self) -> None:
        for slot in self.slots:
            if slot.is_input and not slot.on_host:
                self.cuda.memcpy_htod_async(
                    self.buffers[slot.name], self._locked[slot.name], self.upload_stream
                )

    def execute(self) -> None:
        if not self.context.execute_async_v3(self.stream.handle):
            raise SourceError("TensorRT could not enqueue the engine")

    def download(self) -> None:
        for slot in self.slots:
            if not slot.is_input and not slot.on_host:
                self.cuda.memcpy_dtoh_async(self._locked[slot.name], self.buffers[slot.name], self.stream)

    def finish(self) -> None:
        self.stream.synchronize()

    def synchronize(self) -> None:
        self.cuda.Context.synchronize()

    def fill(self, slot: Slot, byte: int) -> None:
        self.cuda.memset_d8(self.buffers[slot.name], byte, slot.nbytes)

    def delay(self, stage: Stage) -> None:
        if self._scratch is None:
            self._scratch = self.cuda.mem_alloc(_FILL_BYTES)
        stream = self.upload_stream if stage == "upload" else self.stream
        for _ in range(_FILLS):
            self.cuda.memset_d8_async(self._scratch, 0, _FILL_BYTES, stream)

    def close(self) -> None:
        self.context = self.engine = None
        for buffer in (*self.buffers.values(), *([self._scratch] if self._scratch else [])):
            buffer.free()
        self.buffers.clear()
        self.current.pop()
        self.current.detach()


class DebugTensors(trt.IDebugListener):  # type: ignore[misc]  # ships no types
    """Copies debug tensors to the host as the engine makes them.

    Attributes:
        tensors: the last of each, by name.
        failed: what went wrong, which TensorRT itself prints and forgets.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, torch.Tensor] = {}
        self.failed: Exception | None = None
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._pointer = ctypes.pythonapi.PyCapsule_GetPointer
        self._pointer.restype = ctypes.c_void_p
        self._pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]

    def process_debug_tensor(
        self,
        addr: Any,
        location: Any,
        type: Any,  # noqa: A002 - TensorRT passes it by this name
        shape: Any,
        name: str,
        stream: int,
    ) -> bool:
        """Called by TensorRT. `addr` is the address: in TensorRT 10.6 a number, though its documents tell of
        a capsule."""
        try:
            self._keep(addr, location, DTYPES.get(type), tuple(shape), name, stream)
        except Exception as error:
            self.failed = error
            return False
        return True

    def _keep(
        self,
        addr: Any,
        location: Any,
        dtype: torch.dtype | None,
        shape: tuple[int, ...],
        name: str,
        stream: int,
    ) -> None:
        if dtype is None:
            return
        slot = Slot(name, is_input=False, dtype=dtype, shape=shape, on_host=False)
        raw = torch.empty(slot.nbytes, dtype=torch.uint8)
        source = ctypes.c_void_p(addr if isinstance(addr, int) else self._pointer(addr, None))
        self._driver.cuStreamSynchronize(ctypes.c_void_p(stream))
        if location == trt.TensorLocation.DEVICE:
            self._driver.cuMemcpyDtoH_v2(
                ctypes.c_void_p(raw.data_ptr()), source, ctypes.c_size_t(slot.nbytes)
            )
        else:
            ctypes.memmove(raw.data_ptr(), source.value or 0, slot.nbytes)
        self.tensors[name] = raw.view(dtype).reshape(slot.shape)
