"""What a comparison works in."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest

from divergence.errors import ConfigurationError
from divergence.working import check_writable, quiet_collector


class Node:
    def __init__(self) -> None:
        self.own = self


def test_cycles_made_within_are_gone_afterwards() -> None:
    with quiet_collector():
        made = weakref.ref(Node())
        assert made() is not None
    assert made() is None
    assert gc.get_freeze_count() == 0


def test_what_was_there_before_is_not_walked() -> None:
    gc.collect()
    gc.disable()
    try:
        before = weakref.ref(Node())
        with quiet_collector():
            pass
        assert before() is not None
    finally:
        gc.enable()
        gc.collect()
    assert before() is None


def test_what_others_have_frozen_stays_so() -> None:
    gc.freeze()
    try:
        with quiet_collector():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_a_folder_is_looked_at_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("there", "new", "deep/er"):
        check_writable(tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize("name", ["file", "file/in", "link"])
def test_what_is_no_folder_and_cannot_be_one_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ConfigurationError, match=rf"{name}: no folder that can be written into \(.*\); name"):
        check_writable(tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "link"]
