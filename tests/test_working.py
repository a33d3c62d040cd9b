"""What a comparison works in."""

from __future__ import annotations

import gc
import weakref

from divergence.working import quiet_collector


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
