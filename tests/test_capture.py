from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from divergence import captures
from divergence.captures import MANIFEST, PARTIAL, Capture, fingerprint, open_capture
from divergence.errors import CaptureError
from divergence.probes import Observation, RunFacts
from divergence.recording import CaptureWriter
from divergence.sites import Site

FACTS = RunFacts(
    kind="fake",
    source="fake",
    model_digest="0123456789abcdef",
    precision="fp16",
    stacks=("encoder", "decoder"),
    versions={"torch": "2"},
    notes=("a note",),
    unseen_inf={"layers.0.key": "why"},
    outputs=("logits",),
    details={"opset": 20, "nested": [1, None]},
)
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any dtype and bits, also NaN and Inf, also with strides that are not contiguous."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    high = 2 if dtype is torch.bool else 256
    bits = torch.randint(0, high, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    tensor = bits.view(dtype).reshape(shape)
    return tensor.transpose(0, -1) if draw(st.booleans()) and shape else tensor


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _write(path: Path, value: float = 1.0, layers: int = 2, shard_bytes: int = 64) -> Capture:
    with CaptureWriter(path, shard_bytes=shard_bytes) as writer:
        for layer in range(layers):
            writer(
                Observation(
                    Site(layer, "hidden"), torch.full((1, 2, 8), value), ("batch", "token", "channel")
                )
            )
        return writer.close(FACTS, "digest")


@given(st.lists(tensors(), min_size=1, max_size=6), st.integers(1, 200))
def test_tensors_of_every_dtype_come_back_bit_by_bit(
    tmp_path_factory: pytest.TempPathFactory, given_tensors: list[torch.Tensor], shard_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("capture") / "run.capture"
    with CaptureWriter(path, shard_bytes=shard_bytes) as writer:
        for layer, tensor in enumerate(given_tensors):
            writer(Observation(Site(layer, "hidden"), tensor, (), "found so"))
        writer.close(FACTS, "digest")
    capture = open_capture(path)
    assert len(capture.sites) == len(given_tensors)
    for site, tensor in zip(capture.sites, given_tensors, strict=True):
        read = capture.tensor(site)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert _bits(read) == _bits(tensor)
        entry = capture.entries[site]
        assert (entry.dtype, entry.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def test_facts_axes_and_digest_come_back(tmp_path: Path) -> None:
    written = _write(tmp_path / "run.capture")
    read = open_capture(tmp_path / "run.capture")
    assert read == written
    assert read.facts == FACTS
    assert read.inputs_digest == "digest"
    assert read.entries[Site(0, "hidden")].axes == ("batch", "token", "channel")


def test_sites_are_in_execution_order_however_they_were_observed(tmp_path: Path) -> None:
    names = ["output.logits", "decoder.layers.0.key", "encoder.layers.10.hidden", "encoder.layers.2.hidden"]
    with CaptureWriter(tmp_path / "c") as writer:
        for name in names:
            writer(Observation(Site.parse(name), torch.zeros(1)))
        capture = writer.close(FACTS, "")
    assert [str(site) for site in capture.sites] == [names[3], names[2], names[1], names[0]]


def test_masks_come_back_by_stack_with_the_default_for_others(tmp_path: Path) -> None:
    default, own = torch.tensor([[True, False]]), torch.tensor([[True, True]])
    with CaptureWriter(tmp_path / "c") as writer:
        writer(Observation(Site(0, "hidden"), torch.zeros(1)))
        writer.add_mask("", default)
        writer.add_mask("encoder", own)
        capture = writer.close(FACTS, "")
    assert torch.equal(_some(capture.mask("encoder")), own)
    assert torch.equal(_some(capture.mask("decoder")), default)
    assert _write(tmp_path / "without").mask("encoder") is None


def _some(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor


def test_what_is_observed_is_copied(tmp_path: Path) -> None:
    tensor = torch.ones(4)
    with CaptureWriter(tmp_path / "c") as writer:
        writer(Observation(Site(0, "hidden"), tensor))
        tensor.zero_()
        capture = writer.close(FACTS, "")
    assert capture.tensor(Site(0, "hidden")).tolist() == [1.0] * 4


@pytest.mark.parametrize("shard_bytes", [1, 1 << 20])
def test_a_later_observation_of_a_site_replaces_the_earlier(tmp_path: Path, shard_bytes: int) -> None:
    with CaptureWriter(tmp_path / "c", shard_bytes=shard_bytes) as writer:
        for value in (1.0, 2.0):
            writer(Observation(Site(0, "hidden"), torch.full((2,), value)))
        capture = writer.close(FACTS, "")
    assert capture.tensor(Site(0, "hidden")).tolist() == [2.0, 2.0]


def test_no_more_than_a_shard_is_kept_in_memory(tmp_path: Path) -> None:
    with CaptureWriter(tmp_path / "c", shard_bytes=100) as writer:
        for layer in range(10):
            writer(Observation(Site(layer, "hidden"), torch.zeros(30)))
        shards = sorted(path.name for path in (tmp_path / "c.partial").iterdir())
        writer.close(FACTS, "")
    assert len(shards) == 10


def _error(path: Path) -> str:
    with pytest.raises(CaptureError) as raised:
        open_capture(path)
    message = str(raised.value)
    assert "\n" not in message
    return message


_KILLED = """
import sys, time, torch
from divergence.recording import CaptureWriter
from divergence.probes import Observation
from divergence.sites import Site
with CaptureWriter(sys.argv[1], shard_bytes=1) as writer:
    for layer in range(3):
        writer(Observation(Site(layer, "hidden"), torch.zeros(100)))
    print("written", flush=True)
    time.sleep(60)
"""


def _kill_a_writer(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _KILLED, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)


def test_a_killed_run_leaves_a_partial_capture_that_is_refused_and_then_replaced(tmp_path: Path) -> None:
    path = tmp_path / "run.capture"
    _kill_a_writer(path)
    assert not path.exists()
    assert (tmp_path / "run.capture.partial" / "shard-0002.safetensors").is_file()
    assert "run.capture.partial: this capture was interrupted" in _error(path)
    assert "was interrupted" in _error(tmp_path / "run.capture.partial")
    _write(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.capture"]


def test_a_killed_rewrite_leaves_the_capture_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "run.capture"
    _write(path, value=7.0)
    _kill_a_writer(path)
    assert open_capture(path).tensor(Site(0, "hidden")).max() == 7.0


def test_a_failed_rewrite_leaves_the_capture_that_was_there_and_no_partial_one(tmp_path: Path) -> None:
    path = tmp_path / "run.capture"
    _write(path, value=7.0)
    with pytest.raises(RuntimeError), CaptureWriter(path) as writer:
        writer(Observation(Site(0, "hidden"), torch.zeros(1)))
        raise RuntimeError
    assert open_capture(path).tensor(Site(0, "hidden")).max() == 7.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.capture"]


def test_a_complete_rewrite_replaces_the_whole_capture(tmp_path: Path) -> None:
    path = tmp_path / "run.capture"
    _write(path, layers=5)
    _write(path, value=2.0, layers=1)
    assert len(open_capture(path).sites) == 1
    assert sorted(p.name for p in path.iterdir()) == [MANIFEST, "shard-0000.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.capture"]


def test_leaving_without_close_leaves_nothing(tmp_path: Path) -> None:
    with CaptureWriter(tmp_path / "c") as writer:
        writer(Observation(Site(0, "hidden"), torch.zeros(1)))
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_sites_makes_no_capture(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="produced no sites"), CaptureWriter(tmp_path / "c") as writer:
        writer.close(FACTS, "")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_capture_an_empty_folder_and_another_folder_are_told_apart(tmp_path: Path) -> None:
    assert "no such capture; make one with `divergence capture" in _error(tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "the capture is empty" in _error(empty)
    (tmp_path / "file").touch()
    assert "not a capture" in _error(tmp_path)
    assert "not a capture" in _error(tmp_path / "file")


def test_a_shard_of_another_size_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "c"
    _write(path)
    shard = path / "shard-0001.safetensors"
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 10)
    assert _error(path) == (
        f"{shard}: {size - 10} bytes instead of {size} bytes: the capture is damaged; copy or record it again"
    )


def test_a_missing_shard_is_damage(tmp_path: Path) -> None:
    _write(tmp_path / "c")
    (tmp_path / "c" / "shard-0000.safetensors").unlink()
    assert "shard-0000.safetensors: missing instead of" in _error(tmp_path / "c")


def test_a_shard_with_other_bytes_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    capture = _write(tmp_path / "c")
    shard = tmp_path / "c" / "shard-0000.safetensors"
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(CaptureError, match=r"cannot read 'layers\.0\.hidden' .* record the capture again"):
        capture.tensor(Site(0, "hidden"))


def _edit_manifest(path: Path, **changes: Any) -> None:
    manifest = path / MANIFEST
    content = json.loads(manifest.read_text(encoding="utf-8"))
    content.update(changes)
    manifest.write_text(json.dumps(content), encoding="utf-8")


def test_another_schema_is_named(tmp_path: Path) -> None:
    _write(tmp_path / "c")
    _edit_manifest(tmp_path / "c", schema=99)
    assert "capture schema 99, this version reads 1; record it again" in _error(tmp_path / "c")


@pytest.mark.parametrize(
    "changes",
    [
        {"sites": 3},
        {"sites": [3]},
        {"sites": [{"site": "nonsense"}]},
        {"facts": {}},
        {"facts": None},
        {"files": None},
        {"masks": 3},
    ],
)
def test_a_manifest_of_other_content_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    _write(tmp_path / "c")
    _edit_manifest(tmp_path / "c", **changes)
    assert "not a capture manifest" in _error(tmp_path / "c")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'"text"', b"{}"])
def test_a_garbage_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    _write(tmp_path / "c")
    (tmp_path / "c" / MANIFEST).write_bytes(content)
    assert "not a capture manifest" in _error(tmp_path / "c")


def test_a_manifest_without_sites_or_with_an_unlisted_shard_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "c")
    _edit_manifest(tmp_path / "c", files={})
    assert "does not list shard-0000.safetensors" in _error(tmp_path / "c")
    _edit_manifest(tmp_path / "c", sites=[])
    assert "its run found no sites" in _error(tmp_path / "c")


def test_a_folder_or_file_that_is_no_capture_is_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "precious.txt").write_text("precious", encoding="utf-8")
    for path in (folder, folder / "precious.txt"):
        with pytest.raises(CaptureError, match="exists and is not a capture; choose another --out"):
            CaptureWriter(path)
    assert (folder / "precious.txt").read_text(encoding="utf-8") == "precious"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    _write(tmp_path / "c")
    assert open_capture(tmp_path / "c").sites


def test_a_place_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CaptureError, match=r"cannot be made \(NotADirectoryError"):
        CaptureWriter(tmp_path / "file" / "c")


def _fill_the_disk(folder: Path) -> str:
    with pytest.raises(CaptureError) as raised, CaptureWriter(folder / "c", shard_bytes=1 << 20) as writer:
        for layer in range(64):
            writer(Observation(Site(layer, "hidden"), torch.ones(1 << 18)))
        writer.close(FACTS, "")
    assert not (folder / f"c{PARTIAL}").exists()
    return str(raised.value)


def test_full_disk_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    message = _fill_the_disk(tmp_path)
    assert message.startswith(f"{tmp_path}: the disk is full while capturing (")
    assert message.endswith("1 site so far); free some space or set TMPDIR or --out elsewhere")


def test_another_failure_of_the_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", broken)
    assert "cannot write the capture (OSError: [Errno 5] Input/output error)" in _fill_the_disk(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("a small file system can be mounted by root only")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full_is_named_and_an_old_capture_survives(small_disk: Path) -> None:
    _write(small_disk / "c", value=7.0)
    assert "the disk is full while capturing" in _fill_the_disk(small_disk)
    assert open_capture(small_disk / "c").tensor(Site(0, "hidden")).max() == 7.0


@given(tensors())
def test_fingerprint_is_of_contents_whatever_the_strides(tensor: torch.Tensor) -> None:
    assert fingerprint([("w", tensor)]) == fingerprint([("w", tensor.clone().contiguous())])


@given(tensors().filter(lambda tensor: tensor.numel() > 0), st.data())
def test_fingerprint_changes_with_any_bit(tensor: torch.Tensor, data: st.DataObject) -> None:
    bits = tensor.contiguous().reshape(-1).view(torch.uint8).clone()
    bits[data.draw(st.integers(0, bits.numel() - 1))] ^= 1
    changed = bits.view(tensor.dtype).reshape(tensor.shape)
    assert fingerprint([("w", tensor)]) != fingerprint([("w", changed)])


def test_fingerprint_changes_with_name_shape_dtype_and_permutation() -> None:
    weights = torch.arange(1000, dtype=torch.float32)
    found = {
        fingerprint([("w", weights)]),
        fingerprint([("v", weights)]),
        fingerprint([("w", weights.reshape(10, 100))]),
        fingerprint([("w", weights.view(torch.int32))]),
        fingerprint([("w", weights.flip(0))]),
        fingerprint([("w", weights), ("b", torch.zeros(0))]),
    }
    assert len(found) == 6


@pytest.mark.parametrize("size", [1000, 1001])
def test_fingerprint_keeps_no_copy_of_weights_that_it_had_to_make(size: int) -> None:
    """Those of all would be a second model."""
    weights = torch.zeros(size * size, dtype=torch.bfloat16).view(size, size)
    own = weights.untyped_storage()
    for part in captures._digests(weights.t()) + captures._digests(weights[:, 1:]):
        assert part.untyped_storage().data_ptr() == own.data_ptr() or part.untyped_storage().nbytes() < 1000


def test_fingerprint_of_views_and_of_weights_without_storage() -> None:
    weights = torch.arange(33, dtype=torch.bfloat16)
    assert fingerprint([("w", weights[1:])]) == fingerprint([("w", weights[1:].clone())])
    assert fingerprint([("w", torch.empty(4, device="meta"))])
