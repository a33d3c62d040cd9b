"""The recorded probe: a capture made earlier, perhaps on another machine, is a source."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from divergence.captures import Capture, open_capture
from divergence.errors import InputError
from divergence.inputs import digest
from divergence.probes import Description, Observation, Progress, RunFacts, Sink, SiteInfo, silent
from divergence.sites import DETAIL_TENSORS

if TYPE_CHECKING:
    import torch


class RecordedProbe:
    """Yields what a capture holds.

    Args:
        path: folder of the capture, or its URL.

    Attributes:
        capture: the capture, with its token masks.

    Raises:
        CaptureError: there is none, it was interrupted, is empty, damaged, or of another schema.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.capture: Capture = open_capture(path)
        self._where = str(path)

    @property
    def kind(self) -> str:
        """`recorded`; the kind of the run that was recorded is in its facts."""
        return "recorded"

    def describe(self, inputs: Mapping[str, torch.Tensor] | None = None) -> Description:  # noqa: ARG002
        """The sites of the capture, as the probe that recorded it found them."""
        facts = self.capture.facts
        return Description(
            source=self._where,
            kind=self.kind,
            precision=facts.precision,
            sites=tuple(
                SiteInfo(site, entry.found, entry.dtype, entry.shape)
                for site, entry in self.capture.entries.items()
            ),
            inputs={},
            notes=(f"recorded from {facts.kind} source {facts.source}", *facts.notes),
        )

    def run(
        self,
        inputs: Mapping[str, torch.Tensor],
        sink: Sink,
        *,
        detail: bool = False,
        progress: Progress = silent,
    ) -> RunFacts:
        """Hands over copies of the recorded tensors, one at a time.

        Args:
            inputs: what the other source runs on, to be checked against what the capture ran on;
                nothing is checked where it is empty.
            sink: called once per site.
            detail: also the recorded sites of `divergence.sites.DETAIL_TENSORS`.
            progress: told after each site.

        Returns:
            The facts of the recorded run.

        Raises:
            CaptureError: a shard cannot be read.
            InputError: the capture ran on other inputs.
        """
        capture = self.recorded(inputs, detail=detail)
        for done, (site, entry) in enumerate(capture.entries.items(), 1):
            sink(Observation(site, capture.tensor(site).clone(), entry.axes, entry.found))
            progress("reading the capture", done, len(capture.entries))
        return capture.facts

    def recorded(self, inputs: Mapping[str, torch.Tensor], *, detail: bool = False) -> Capture:
        """The capture as it lies on disk, with or without the sites of `divergence.sites.DETAIL_TENSORS`.

        Raises:
            InputError: it ran on other inputs.
        """
        capture = self.capture
        if inputs:
            self.check_inputs(
                digest(inputs), "these are", "give the same inputs, or record it again on these"
            )
        wanted = {s: e for s, e in capture.entries.items() if detail or s.tensor not in DETAIL_TENSORS}
        return replace(capture, entries=wanted)

    def check_inputs(self, given: str, whose: str, mend: str) -> None:
        """Makes sure that the recorded run was on the inputs whose digest is `given`.

        Raises:
            InputError: it was not; `whose` says whose these are, and `mend` what to do.
        """
        if given != self.capture.inputs_digest:
            own = self.capture.inputs_digest
            raise InputError(f"{self._where}: was recorded on inputs {own} and {whose} {given}; {mend}")
