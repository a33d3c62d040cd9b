"""The fake probe: yields the tensors that it is given, for tests and for authors of probes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from divergence.captures import fingerprint
from divergence.errors import InputError, nearest
from divergence.precision import coarsest, dtype_name
from divergence.probes import Description, Observation, Progress, RunFacts, Sink, SiteInfo, silent
from divergence.sites import DETAIL_TENSORS, Site, in_execution_order

if TYPE_CHECKING:
    import torch


class FakeProbe:
    """A source whose every run gives the same tensors.

    Args:
        tensors: tensor by site, or by a site's text. Those of a layer are in the canonical layout of
            `Site.axes`, or have other ranks and no axes.
        inputs: names of the inputs that a run must get; any will do if None.
        source: what the facts call it.

    Raises:
        ConfigurationError: a text that is not a site.
    """

    def __init__(
        self,
        tensors: Mapping[Site, torch.Tensor] | Mapping[str, torch.Tensor],
        *,
        inputs: tuple[str, ...] | None = None,
        source: str = "fake",
    ) -> None:
        by_site = {Site.parse(str(site)): tensor for site, tensor in tensors.items()}
        self._stacks = tuple(dict.fromkeys(site.stack for site in by_site if site.layer is not None)) or ("",)
        self._tensors = {site: by_site[site] for site in in_execution_order(by_site, self._stacks)}
        self._inputs = inputs
        self._source = source

    @property
    def kind(self) -> str:
        """`fake`."""
        return "fake"

    def describe(self, inputs: Mapping[str, torch.Tensor] | None = None) -> Description:
        """The sites that it was given.

        Raises:
            InputError: `inputs` are given and have other names.
        """
        if inputs is not None:
            self._check(inputs)
        return Description(
            source=self._source,
            kind=self.kind,
            precision=self._precision,
            sites=tuple(
                SiteInfo(site, "given", dtype_name(tensor.dtype), tuple(tensor.shape))
                for site, tensor in self._tensors.items()
            ),
            inputs=dict.fromkeys(self._inputs or (), "any"),
        )

    def run(
        self,
        inputs: Mapping[str, torch.Tensor],
        sink: Sink,
        *,
        detail: bool = False,
        progress: Progress = silent,
    ) -> RunFacts:
        """Hands over copies of the given tensors in execution order.

        Raises:
            InputError: `inputs` have other names.
        """
        self._check(inputs)
        wanted = {s: t for s, t in self._tensors.items() if detail or s.tensor not in DETAIL_TENSORS}
        for done, (site, tensor) in enumerate(wanted.items(), 1):
            axes = site.axes if len(site.axes) == tensor.ndim else ()
            sink(Observation(site, tensor.clone(), axes, "given"))
            progress("giving tensors", done, len(wanted))
        return RunFacts(
            kind=self.kind,
            source=self._source,
            model_digest=fingerprint((str(site), tensor) for site, tensor in self._tensors.items()),
            precision=self._precision,
            stacks=self._stacks,
            outputs=tuple(site.tensor for site in wanted if site.layer is None),
        )

    @property
    def _precision(self) -> str | None:
        return coarsest(dtype_name(tensor.dtype) for tensor in self._tensors.values())

    def _check(self, inputs: Mapping[str, torch.Tensor]) -> None:
        if self._inputs is None:
            return
        for name in self._inputs:
            if name not in inputs:
                raise InputError(f"{self._source}: input '{name}' is missing; give it")
        for name in inputs:
            if name not in self._inputs:
                raise InputError(f"{self._source}: has no input '{name}'{nearest(name, self._inputs)}")
