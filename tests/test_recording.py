"""What stays in memory, what goes to disk, and what comes from a device while the model goes on."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from divergence.budget import Budget
from divergence.captures import Capture, Entry
from divergence.comparing import Meanwhile, compare_pair
from divergence.config import Config, parse_tolerance
from divergence.errors import CaptureError
from divergence.pipeline import compare
from divergence.probes import Observation, RunFacts
from divergence.probes.fake import FakeProbe
from divergence.recording import CaptureWriter
from divergence.setting import record
from divergence.sites import HIDDEN_AXES, Site
from divergence.staging import SLOTS, WRITERS, Receiver, Staging
from tests.models import inputs_for, llama
from tests.test_pipeline import faulty

FACTS = RunFacts("fake", "fake", "0", precision="fp32")
TENSOR = 4 * 8 * 16  # bytes of each


def hidden(layer: int, value: float | None = None) -> Observation:
    shape = (1, 8, 16)
    tensor = torch.full(shape, float(layer) if value is None else value)
    return Observation(Site(layer, "hidden"), tensor, HIDDEN_AXES, "given")


def written(folder: Path, memory: int, layers: int = 6, **options: Any) -> Capture:
    with CaptureWriter(folder / "run.capture", budget=Budget(memory), **options) as writer:
        for layer in range(layers):
            writer(hidden(layer))
        writer.add_mask("", torch.ones(1, 8, dtype=torch.bool))
        return writer.close(FACTS, "digest")


def test_what_fits_never_touches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", None)
    capture = written(tmp_path, 1 << 20)
    assert list(tmp_path.iterdir()) == []
    assert len(capture.held) == 7
    assert [float(capture.tensor(site).max()) for site in capture.sites] == [0, 1, 2, 3, 4, 5]
    assert all(capture.span(site) is None for site in capture.sites)


@pytest.mark.parametrize("fitting", [0, 1, 4, 6])
def test_what_does_not_fit_goes_to_disk_and_reads_the_same(tmp_path: Path, fitting: int) -> None:
    capture = written(tmp_path, 2 * fitting * TENSOR)
    assert [site.layer for site in capture.sites if str(site) in capture.held] == list(range(fitting))
    assert [float(capture.tensor(site).max()) for site in capture.sites] == [0, 1, 2, 3, 4, 5]
    mask = capture.mask("")
    assert mask is not None
    assert bool(mask.all())


def test_a_tensor_that_is_replaced_gives_its_room_back(tmp_path: Path) -> None:
    budget = Budget(4 * TENSOR)
    with CaptureWriter(tmp_path / "c", budget=budget) as writer:
        for value in (1.0, 2.0, 3.0):
            writer(hidden(0, value))
        writer(hidden(1))
        capture = writer.close(FACTS, "")
    assert len(capture.held) == 2
    assert capture.tensor(Site(0, "hidden")).max() == 3.0


def test_a_run_that_fails_gives_its_room_back_and_leaves_no_file(tmp_path: Path) -> None:
    budget = Budget(4 * TENSOR)
    with pytest.raises(RuntimeError), CaptureWriter(tmp_path / "c", budget=budget) as writer:
        for layer in range(4):
            writer(hidden(layer))
        raise RuntimeError
    assert budget.take(2 * TENSOR)
    assert list(tmp_path.iterdir()) == []


def test_half_of_the_budget_is_for_what_is_under_way() -> None:
    budget = Budget(100)
    assert budget.under_way == 50
    assert budget.take(50)
    assert not budget.take(1)
    budget.give(1)
    assert budget.take(1)


def test_a_dtype_that_no_capture_can_hold_is_one_line(tmp_path: Path) -> None:
    tensor = torch.zeros(2, dtype=torch.complex128)
    refused = pytest.raises(CaptureError, match="layers.0.hidden: a capture cannot hold .* complex128")
    with refused, CaptureWriter(tmp_path / "c") as writer:
        writer(Observation(Site(0, "hidden"), tensor))


@pytest.mark.parametrize("memory", [1, 40_000, 1 << 30])
@pytest.mark.parametrize("replay", ["auto", "always"])
def test_the_budget_changes_no_figure(memory: int, replay: Any) -> None:
    model, inputs = llama(4), inputs_for("llama", tokens=33)
    options: dict[str, Any] = {"config": Config(), "replay": replay}
    usual = compare(model, faulty(model, 2), inputs, **options)
    result = compare(model, faulty(model, 2), inputs, memory=memory, **options)
    assert (result.sites, result.causes, result.reason) == (usual.sites, usual.causes, usual.reason)
    assert usual.verdict == "fail"


def test_kept_captures_are_whole_whatever_the_budget(tmp_path: Path) -> None:
    model, inputs = llama(2), inputs_for("llama")
    compare(model, model, inputs, config=Config(), keep=tmp_path, memory=1 << 30)
    ref, cand = (str(tmp_path / f"{name}.capture") for name in ("reference", "candidate"))
    again = compare(ref, cand, inputs, config=Config(), precision="fp32")
    assert again.reason == "all 7 sites are equal to the bit"


def test_a_recorded_capture_is_read_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"x": torch.zeros(1)}
    tensors = {f"layers.{i}.hidden": torch.randn(1, 8, 16) for i in range(4)}
    for name, shift in (("ref", 0.0), ("cand", 1e-5)):
        probe = FakeProbe({site: tensor * (1 + shift) for site, tensor in tensors.items()})
        record(probe, inputs, tmp_path / f"{name}.capture", detail=False, progress=lambda *_: None)
    monkeypatch.setattr(CaptureWriter, "__init__", None)
    result = compare(
        str(tmp_path / "ref.capture"),
        str(tmp_path / "cand.capture"),
        inputs,
        config=Config(),
        tolerance=parse_tolerance("rel_l2=1e-4", Config().tolerance),
        memory=1000,
    )
    assert result.verdict == "pass"
    assert [site.rel_l2 for site in result.sites] == [pytest.approx(1e-5, rel=0.1)] * 4


def captured(folder: Path, name: str, tensors: dict[str, Tensor], arrived: Any = None) -> Capture:
    with CaptureWriter(folder / name, budget=Budget(1 << 30), arrived=arrived) as writer:
        for site, tensor in tensors.items():
            writer(Observation(Site.parse(site), tensor, HIDDEN_AXES, "given"))
        return writer.close(FACTS, "")


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> None:
    """A core that no model uses."""
    monkeypatch.setattr("divergence.comparing._spare_core", lambda: True)


def test_a_model_that_uses_every_core_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("divergence.comparing._spare_core", lambda: False)
    tensors = {"layers.0.hidden": torch.ones(1, 8, 16)}
    with Meanwhile(captured(tmp_path, "ref", tensors)) as meanwhile:
        captured(tmp_path, "cand", tensors, meanwhile)
        assert not meanwhile._found
        with DeviceWriter(tmp_path / "c", budget=Budget(1 << 30), arrived=meanwhile) as writer:
            writer(hidden(0))
            writer.close(FACTS, "")
        assert len(meanwhile._found) == 1


@pytest.mark.usefixtures("core")
def test_sites_are_compared_while_the_candidate_runs_and_give_the_same(tmp_path: Path) -> None:
    from divergence.alignment import align

    ref = {f"layers.{i}.hidden": torch.randn(1, 8, 16) for i in range(3)}
    cand = {site: tensor * 1.01 for site, tensor in ref.items()}
    reference = captured(tmp_path, "ref", ref)
    with Meanwhile(reference) as meanwhile:
        candidate = captured(tmp_path, "cand", cand, meanwhile)
        for pair in align(reference.entries, candidate.entries).pairs:
            found = meanwhile.take(pair, candidate)
            expected = compare_pair(pair, reference, candidate)
            assert found is not None
            assert (found.rel_l2, found.mse) == (expected.rel_l2, expected.mse)


@pytest.mark.usefixtures("core")
def test_what_was_compared_too_early_is_compared_again(tmp_path: Path) -> None:
    from divergence.alignment import align

    site = Site(0, "hidden")
    reference = captured(tmp_path, "ref", {str(site): torch.ones(1, 8, 16)})
    with (
        Meanwhile(reference) as meanwhile,
        CaptureWriter(tmp_path / "cand", budget=Budget(1 << 30), arrived=meanwhile) as writer,
    ):
        writer(hidden(0, 1.0))
        candidate = writer.close(FACTS, "")
        (pair,) = align(reference.entries, candidate.entries).pairs
        assert meanwhile.take(pair, candidate) is not None
        replaced = captured(tmp_path, "other", {str(site): torch.full((1, 8, 16), 2.0)})
        assert meanwhile.take(pair, replaced) is None


@pytest.mark.usefixtures("core")
def test_sites_without_a_certain_partner_wait(tmp_path: Path) -> None:
    reference = captured(tmp_path, "ref", {"layers.0.hidden": torch.ones(1, 8, 16)})
    with Meanwhile(reference, exclude=["layers.0.hidden"]) as meanwhile:
        captured(tmp_path, "cand", {"layers.0.hidden": torch.ones(1, 8, 16)}, meanwhile)
        assert not meanwhile._found
    with Meanwhile(reference) as meanwhile:
        captured(tmp_path, "cand", {"layers.0.hidden": torch.ones(1, 16, 8)}, meanwhile)
        captured(tmp_path, "cand", {"layers.1.hidden": torch.ones(1, 8, 16)}, meanwhile)
        assert not meanwhile._found


class SlowCopy:
    """A copy that is there when it is waited for; every third was there at once."""

    def __init__(self, source: Tensor, buffer: Tensor, number: int) -> None:
        self._sides = buffer, source
        self._number = number

    def query(self) -> bool:
        if self._number % 3 == 0:
            self.synchronize()
        return self._number % 3 == 0

    def synchronize(self) -> None:
        time.sleep(0.001)
        self._sides[0].copy_(self._sides[1])


class Taking:
    """Takes bytes by a function; what it is told to expect is no more than what comes."""

    def __init__(self, take: Callable[[Tensor], None]) -> None:
        self._take = take
        self.expected = 0

    def expect(self, nbytes: int) -> None:
        self.expected += nbytes

    def __call__(self, octets: Tensor) -> None:
        self._take(octets)


class SlowDevice:
    """A device whose copies are there only when they are waited for: until then the buffer holds rubbish."""

    def __init__(self) -> None:
        self.made = 0
        self.started = 0

    def buffer(self, nbytes: int) -> Tensor:
        self.made += 1
        return torch.full((nbytes,), 0xAB, dtype=torch.uint8)

    def start(self, source: Tensor, buffer: Tensor, streams: Iterable[torch.cuda.Stream]) -> SlowCopy:
        assert source.shape == buffer.shape
        assert not list(streams)
        self.started += 1
        buffer.fill_(0xCD)
        return SlowCopy(source, buffer, self.started)


@pytest.mark.parametrize("memory", [1, 100, 2000, 1 << 20])
def test_tensors_of_a_device_arrive_whole_and_in_order(memory: int) -> None:
    device = SlowDevice()
    staging = Staging(device, memory)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 5, 7), (3,), (0, 4), (), (2, 60, 3), (1, 1, 1)] * 4
    dtypes = [torch.float32, torch.bfloat16, torch.int8]
    sent = [
        torch.randn(shape, generator=generator).to(dtypes[i % 3]).transpose(0, -1)
        if len(shape) > 1
        else torch.randn(shape, generator=generator).to(dtypes[i % 3])
        for i, shape in enumerate(shapes)
    ]
    received: dict[int, list[Tensor]] = {number: [] for number in range(len(sent))}
    order: dict[int, list[int]] = {writer: [] for writer in range(WRITERS)}
    finished: list[int] = []
    taking: list[Taking] = []

    def receiver(writer: int, number: int) -> Receiver:
        def receive(part: Tensor) -> None:
            order[writer].append(number)
            received[number].append(part.clone())

        taking.append(Taking(receive))
        return taking[-1]

    for number, tensor in enumerate(sent):
        kept = tensor.clone()
        staging.send(
            kept,
            lambda writer, number=number: receiver(writer, number),  # type: ignore[misc]
            lambda number=number: finished.append(number),  # type: ignore[misc]
        )
        kept.zero_()  # the model writes into it as soon as `send` returns
    staging.close()
    assert sorted(finished) == list(range(len(sent)))
    for number, tensor in enumerate(sent):
        flat = torch.cat(received[number]).view(tensor.dtype)
        assert torch.equal(flat, tensor.contiguous().reshape(-1)), number
    assert all(numbers == sorted(numbers) for numbers in order.values())
    assert sum(t.expected for t in taking) > 0
    assert all(t.expected <= tensor.nbytes for t, tensor in zip(taking, sent, strict=True))
    assert device.made <= SLOTS
    assert staging.allocated <= max(memory, 1)
    if memory == 1 << 20:
        assert device.started == 1, "small tensors go together"


def test_tensors_that_stay_lie_together_and_are_whole_when_they_are_said_to_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("divergence.staging.SHEETS", (1 << 12, 1 << 14))
    device = SlowDevice()
    staging = Staging(device, SLOTS << 12)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 5, 7), (3,), (0, 4), (), (2, 60, 8), (1, 1, 1), (17, 40), (1 << 10,)] * 4
    dtypes = [torch.float32, torch.bfloat16, torch.int8]
    sent: list[Tensor] = []
    kept: list[Tensor | None] = []
    done: dict[int, Tensor] = {}
    between: list[Tensor] = []
    for number, shape in enumerate(shapes):
        tensor = torch.randn(shape, generator=generator).to(dtypes[number % 3])
        tensor = tensor.transpose(0, -1) if number % 2 and tensor.dim() else tensor
        sent.append(tensor.clone())

        def there(found: Tensor, number: int = number) -> None:
            done[number] = found.clone()

        kept.append(staging.keep(tensor, there))
        if number % 5 == 0:
            staging.send(tensor, lambda _: Taking(lambda part: between.append(part.clone())))
        tensor.fill_(1)  # the model writes into it as soon as it was sent
    assert staging.keep(torch.zeros((1 << 12) + 1, dtype=torch.int8)) is None, "it is larger than a slot"
    staging.close()
    for number, (tensor, found) in enumerate(zip(sent, kept, strict=True)):
        assert found is not None
        assert found.is_contiguous()
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor), number
        assert torch.equal(done[number], tensor), "it was not there when it was said to be"
    assert sum(t.numel() * t.itemsize for t in sent[::5]) == sum(part.numel() for part in between)
    sheets = {
        found.untyped_storage().data_ptr(): found.untyped_storage().nbytes()
        for found in kept
        if found is not None
    }
    assert 1 < len(sheets) < len(kept) / 4
    assert sum(sheets.values()) < 2 * sum(tensor.nbytes for tensor in sent)


def test_the_sender_waits_for_a_slot_only() -> None:
    device = SlowDevice()
    staging = Staging(device, 16 * SLOTS)
    go_on = threading.Event()

    def slow(_: Tensor) -> None:
        assert go_on.wait(10)

    for _ in range(SLOTS):
        staging.send(torch.zeros(4), lambda _: Taking(slow))  # returns though nothing was received yet
    assert device.made == SLOTS
    waiting = threading.Thread(target=staging.send, args=(torch.zeros(4), lambda _: Taking(slow)))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive(), "there were more slots than are allowed"
    go_on.set()
    waiting.join()
    staging.close()
    assert device.made == SLOTS


def test_what_a_receiver_raises_is_told_to_the_sender_and_nothing_hangs() -> None:
    def broken(_: Tensor) -> None:
        raise OSError(28, "No space left on device")

    staging = Staging(SlowDevice(), 64)
    done: list[int] = []
    with pytest.raises(OSError, match="No space left"):
        for _ in range(100):
            staging.send(torch.zeros(64), lambda _: Taking(broken), lambda: done.append(1))
    with pytest.raises(OSError, match="No space left"):
        staging.close()
    assert not done


class DeviceWriter(CaptureWriter):
    """Takes tensors of the CPU for those of a slow device."""

    def __init__(self, path: Path, **options: Any) -> None:
        super().__init__(path, **{"copier": SlowDevice(), **options})

    def _on_cpu(self, tensor: Tensor) -> bool:
        return False


@pytest.mark.parametrize("memory", [None, 1, 6 * TENSOR, 12 * TENSOR, 1 << 20])
def test_a_capture_of_a_device_is_that_of_the_cpu(tmp_path: Path, memory: int | None) -> None:
    budget = None if memory is None else Budget(memory)
    arrived: list[tuple[Entry, Tensor]] = []
    with DeviceWriter(
        tmp_path / "c", budget=budget, shard_bytes=1000, arrived=lambda e, t, _: arrived.append((e, t))
    ) as writer:
        for layer in range(6):
            observation = hidden(layer)
            writer(observation)
            observation.tensor.fill_(-1)
        writer(hidden(2, 7.0))
        writer.add_mask("", torch.ones(1, 8, dtype=torch.bool))
        capture = writer.close(FACTS, "digest")
    assert [float(capture.tensor(site).min()) for site in capture.sites] == [0, 1, 7, 3, 4, 5]
    # Of half the budget; in the fourth case they lie together, so what is replaced stays and fills it.
    assert len(arrived) == {None: 0, 1: 0, 6 * TENSOR: 4, 12 * TENSOR: 6, 1 << 20: 7}[memory]
    for entry, tensor in arrived:
        assert float(tensor.min()) in (entry.site.layer, 7.0)


@pytest.mark.parametrize("memory", [None, 1 << 20])
def test_what_holds_a_closed_writer_holds_no_buffers_and_no_tensors(
    tmp_path: Path, memory: int | None
) -> None:
    """A model's observer holds its sink in a cycle, which is collected late or never."""
    made: list[weakref.ref[Tensor]] = []

    class Counted(SlowDevice):
        def buffer(self, nbytes: int) -> Tensor:
            made_now = super().buffer(nbytes)
            made.append(weakref.ref(made_now))
            return made_now

    budget = None if memory is None else Budget(memory)
    with DeviceWriter(tmp_path / "c", budget=budget, copier=Counted()) as writer:
        for layer in range(6):
            writer(hidden(layer))
        capture = writer.close(FACTS, "digest")
    held = [weakref.ref(tensor) for tensor in capture.held.values()]
    del capture
    assert made
    assert not [found for found in (*made, *held) if found() is not None]


def test_a_disk_that_fails_under_a_device_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with (
        pytest.raises(CaptureError, match="the disk is full while capturing"),
        DeviceWriter(tmp_path / "c") as writer,
    ):
        for layer in range(100):
            writer(hidden(layer))
        writer.close(FACTS, "digest")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("memory", [None, 1 << 20, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.float8_e4m3fn])
def test_tensors_of_a_real_device_arrive_though_the_model_writes_into_them_at_once(
    tmp_path: Path, memory: int | None, dtype: torch.dtype
) -> None:
    sent = []
    with (
        torch.inference_mode(),
        CaptureWriter(tmp_path / "c", budget=None if memory is None else Budget(memory)) as writer,
    ):
        for layer in range(40):
            raw = torch.randint(0, 2, (1, 1000, 4000 if layer % 4 else 9), dtype=torch.uint8, device="cuda")
            tensor = raw.to(dtype).transpose(1, 2) if layer % 2 else raw.to(dtype)
            sent.append(tensor.cpu())
            torch.cuda._sleep(1_000_000)  # the copy is still under way when the model writes
            writer(Observation(Site(layer, "hidden"), tensor, HIDDEN_AXES, "given"))
            tensor.zero_()
        capture = writer.close(FACTS, "digest")
    for site, tensor in zip(capture.sites, sent, strict=True):
        found = capture.tensor(site)
        assert found.dtype == tensor.dtype
        assert torch.equal(found.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
        assert not found.is_inference()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("memory", [None, 1 << 30])
def test_tensors_of_several_streams_go_together(tmp_path: Path, memory: int | None) -> None:
    streams = [torch.cuda.Stream(), torch.cuda.current_stream()]
    kept = []
    with CaptureWriter(tmp_path / "c", budget=None if memory is None else Budget(memory)) as writer:
        for layer in range(8):
            with torch.cuda.stream(streams[layer % 2]):
                if layer % 2 == 0:
                    torch.cuda._sleep(100_000_000)  # the other stream is long past this one
                kept.append(torch.full((1, 10, 10), float(layer), device="cuda"))
                writer(Observation(Site(layer, "hidden"), kept[-1], HIDDEN_AXES, "given"))
        capture = writer.close(FACTS, "digest")
    for layer, site in enumerate(capture.sites):
        assert torch.equal(capture.tensor(site), torch.full((1, 10, 10), float(layer))), layer


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_a_device_is_captured_as_on_the_cpu(tmp_path: Path) -> None:
    model, inputs = llama(3), inputs_for("llama")
    result = compare(model, llama(3).cuda(), inputs, config=Config(), precision="fp32", replay="always")
    assert result.verdict == "pass", result.reason
    result = compare(llama(3).cuda(), faulty(llama(3), 1).cuda(), inputs, config=Config(), memory=1 << 16)
    assert result.first_divergence is not None
    assert result.first_divergence.site == "layers.1.value"
