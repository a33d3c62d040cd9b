"""References that have run in a test session: one run for all tests that compare with the same one."""

from __future__ import annotations

import hashlib
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from divergence.identity import identity
from divergence.inputs import digest
from divergence.prepared import Reference
from divergence.setting import record

if TYPE_CHECKING:
    from divergence.captures import Capture
    from divergence.noise import Floor
    from divergence.probes.pytorch import PyTorchProbe
    from divergence.probes.pytorch.layer_call import LayerCall
    from divergence.setting import Setting
    from divergence.sites import Site

KEPT = 4
"""References kept at a time: each holds what its layers were called with in memory."""


@dataclass(frozen=True)
class _Kept:
    folder: tempfile.TemporaryDirectory[str]
    capture: Capture
    calls: tuple[LayerCall, ...]
    floors: dict[str, tuple[Mapping[Site, Floor], str]]


class ReferenceCache:
    """Captures of PyTorch references, the noise floors taken from them, and their layers' calls.

    A reference is known again by the identity of its module, the digest of its inputs, the detail
    asked for and torch's numeric settings. The module itself is not kept: what replays is the
    module at hand, which computes the same.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def prepare(self, probe: PyTorchProbe, setting: Setting) -> Reference | None:
        """The reference after its run, now or earlier; None where it cannot be told from others.

        Raises:
            DivergenceError: it cannot be run.
        """
        key = _key(probe, setting)
        if key is None:
            return None
        known = self._kept.get(key)
        if known is None:
            known = _run(probe, setting)
            self._kept[key] = known
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)[1].folder.cleanup()
        self._kept.move_to_end(key)
        layers = {stack.name: stack.layers for stack in probe.stacks}
        probe.calls = [replace(call, module=layers[call.stack][call.layer]) for call in known.calls]
        # Floors that the user gives are of this comparison alone.
        return Reference(known.capture, probe, known.floors if setting.options.floor is None else {})

    def close(self) -> None:
        """Deletes all captures."""
        for kept in self._kept.values():
            kept.folder.cleanup()
        self._kept.clear()


def _run(probe: PyTorchProbe, setting: Setting) -> _Kept:
    from torch import nn

    folder = tempfile.TemporaryDirectory(prefix="divergence-reference-")
    try:
        capture = record(
            probe,
            setting.inputs,
            Path(folder.name) / "reference.capture",
            detail=setting.options.detail,
            progress=setting.progress,
            mask=setting.config.mask,
            record=True,
        )
    except BaseException:
        folder.cleanup()
        raise
    nothing = nn.Identity()
    return _Kept(folder, capture, tuple(replace(call, module=nothing) for call in probe.calls), {})


def _key(probe: PyTorchProbe, setting: Setting) -> str | None:
    import torch

    found = identity(probe.model)
    if found is None:
        return None
    parts = (
        found,
        digest(setting.inputs),
        list(setting.inputs),
        setting.config.mask,
        setting.options.detail,
        probe.source,
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()
