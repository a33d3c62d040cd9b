"""Shards are safetensors files, however they were written, and can be read a part at a time."""

from __future__ import annotations

import json
import mmap
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from divergence.comparison import compare_tensors
from divergence.errors import CaptureError
from divergence.lanes import Lane, Shards
from divergence.shards import HEADER_BYTES, ReadAhead, Shard, ShardWriter, Span, pieces, release
from tests.test_capture import tensors


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@given(tensors(), st.integers(1, 64))
def test_pieces_are_the_bytes_in_order(tensor: torch.Tensor, limit: int) -> None:
    found = list(pieces(tensor, limit))
    assert b"".join(map(bits, found)) == bits(tensor)
    assert all(piece.numel() <= max(limit, tensor.element_size()) for piece in found)


@given(st.lists(tensors(), min_size=1, max_size=6), st.integers(1, 64))
def test_safetensors_reads_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, written: list[torch.Tensor], limit: int
) -> None:
    path = tmp_path_factory.mktemp("shard") / "a.safetensors"
    shard = ShardWriter(path)
    kept = {}
    for number, tensor in enumerate(written):
        name = f"tensor {number}"
        if shard.begin(name, tensor.dtype, tuple(tensor.shape)):
            kept[name] = tensor
            for piece in pieces(tensor, limit):
                shard.write(piece)
    assert shard.close() == path.stat().st_size
    with safe_open(path, framework="pt") as theirs:
        assert sorted(theirs.keys()) == sorted(kept)
        ours = Shard(path)
        for name, tensor in kept.items():
            for read in (theirs.get_tensor(name), ours.tensor(name)):
                assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
                assert bits(read) == bits(tensor)


def test_what_safetensors_wrote_is_read(tmp_path: Path) -> None:
    written = {
        "a": torch.tensor([True, False, True]),
        "b": torch.randn(3, 5),
        "c": torch.tensor(3.0).double(),
    }
    save_file(written, tmp_path / "a.safetensors", metadata={"who": "they"})
    shard = Shard(tmp_path / "a.safetensors")
    for name, tensor in written.items():
        assert torch.equal(shard.tensor(name), tensor)


def test_a_tensor_written_twice_is_the_later_one_and_the_file_stays_whole(tmp_path: Path) -> None:
    shard = ShardWriter(tmp_path / "a.safetensors")
    for value in (1.0, 2.0):
        shard.begin("x", torch.float32, (2,))
        shard.write(torch.full((2,), value).view(torch.uint8))
    shard.close()
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.get_tensor("x").tolist() == [2.0, 2.0]


def test_a_header_is_never_too_long(tmp_path: Path) -> None:
    shard = ShardWriter(tmp_path / "a.safetensors")
    number = 0
    while shard.begin(f"a rather long name of a tensor {number}", torch.bfloat16, (1, 2, 3)):
        shard.write(torch.zeros(12, dtype=torch.uint8))
        number += 1
    shard.close()
    assert number > 50
    assert (tmp_path / "a.safetensors").stat().st_size == HEADER_BYTES + 12 * number
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert len(file.keys()) == number


def test_a_header_is_never_too_long_where_tensors_are_replaced(tmp_path: Path) -> None:
    shard = ShardWriter(tmp_path / "a.safetensors")
    number = 0
    while shard.begin("x", torch.uint8, (1,)):
        shard.write(torch.tensor([number % 256], dtype=torch.uint8))
        number += 1
    shard.close()
    assert number > 100
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.get_tensor("x").item() == (number - 1) % 256


def test_a_name_that_no_header_takes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"nnn\.\.\.: this name is too long for a capture"):
        Lane(Shards(tmp_path, 1 << 20)).begin("n" * HEADER_BYTES, torch.float32, (1,))


@pytest.mark.parametrize(
    "header",
    [
        b"{}" + b"\xff" * 30,
        json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode(),
        json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}}).encode(),
        json.dumps({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}).encode(),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(ValueError, match=r".+"):
        Shard(path)


def large(path: Path, tensor: torch.Tensor) -> Shard:
    save_file({"x": tensor}, path)
    return Shard(path)


def resident(prefix: str) -> int:
    """Bytes of the mapping of a file whose path ends so that are in memory (Linux)."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(prefix)
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found


linux = pytest.mark.skipif(
    not Path("/proc/self/smaps").exists() or not hasattr(mmap, "MADV_DONTNEED"), reason="needs Linux"
)


@linux
def test_what_was_compared_does_not_stay_in_memory(tmp_path: Path) -> None:
    ref = torch.randn(1, 512, 8192)
    cand = ref * 1.001
    on_disk = [large(tmp_path / f"{n}.safetensors", t) for n, t in (("ref", ref), ("cand", cand))]
    names = [f"{tmp_path.name}/{n}.safetensors" for n in ("ref", "cand")]
    mapped = [shard.tensor("x") for shard in on_disk]
    float(mapped[0].sum())
    assert resident(names[0]) > 15 << 20, "nothing was in memory: this test would show nothing"
    assert compare_tensors(*mapped).rel_l2 == compare_tensors(ref, cand).rel_l2
    assert max(map(resident, names)) < 1 << 20
    assert torch.equal(mapped[0], ref)


@linux
def test_the_figures_are_the_same_from_disk_in_every_layout(tmp_path: Path) -> None:
    for number, order in enumerate([(0, 1, 2, 3), (0, 2, 1, 3), (3, 2, 1, 0)]):
        ref = torch.randn(2, 4, 300, 1024).permute(order)
        cand = (ref.float() * 1.01).to(torch.bfloat16)
        mapped = []
        for name, tensor in (("ref", ref), ("cand", cand)):
            back = [order.index(i) for i in range(4)]
            plain = tensor.permute(back).contiguous()
            mapped.append(large(tmp_path / f"{name}{number}", plain).tensor("x").permute(order))
        found, expected = compare_tensors(*mapped), compare_tensors(ref, cand)
        assert (found.mse, found.rel_l2, found.max_abs_at) == (
            expected.mse,
            expected.rel_l2,
            expected.max_abs_at,
        )


def test_releasing_other_tensors_does_nothing(tmp_path: Path) -> None:
    tensor = torch.randn(1 << 16)
    before = tensor.clone()
    release(tensor)
    release(tensor[100:])
    release(torch.empty(0))
    assert torch.equal(tensor, before)


class Disk:
    """Notes what is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[int] = []
        monkeypatch.setattr("os.preadv", self._preadv)

    def _preadv(self, file: int, buffers: list[memoryview], start: int) -> int:
        self.read.append(start)
        return len(buffers[0])

    def settled(self) -> int:
        """How many parts were read, once none is read any more."""
        count = -1
        while count != len(self.read):
            count = len(self.read)
            time.sleep(0.05)
        return count


def test_the_disk_reads_ahead_by_the_distance_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    disk = Disk(monkeypatch)
    piece = ReadAhead.PIECE
    groups = [[Span(tmp_path / "file", i * piece, (i + 1) * piece)] for i in range(10)]
    with ReadAhead(groups, distance=3 * piece, drop=False) as ahead:
        assert disk.settled() == 3
        ahead.done(1)
        assert disk.settled() == 5
        ahead.done(9)
        assert disk.settled() == 10
    assert disk.read == [i * piece for i in range(10)]


def test_both_files_are_read_in_turn_and_stopping_early_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        (tmp_path / name).touch()
    disk = Disk(monkeypatch)
    piece = ReadAhead.PIECE
    group = [Span(tmp_path / "a", 0, 5 * piece), Span(tmp_path / "b", 100, 100 + 5 * piece)]
    before = threading.active_count()
    with ReadAhead([group], distance=4 * piece, drop=False):
        disk.settled()
    assert threading.active_count() == before
    assert disk.read == [0, 100, piece, 100 + piece]


def test_a_file_that_is_gone_is_not_the_reader_s_business(tmp_path: Path) -> None:
    with ReadAhead([[Span(tmp_path / "none", 0, 10)]], distance=1, drop=True) as ahead:
        ahead.done(0)
