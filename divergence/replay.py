"""Replay: the reference's layers on the candidate's own inputs to them.

What a layer of the candidate adds to the error is its output against the *reference's* layer run
on what the candidate fed into that layer: **introduced** error. It needs nothing from the
candidate but its hidden states. The floor of the same layer is taken in the same way, in the
candidate's precision. What lies outside the layers (embedding, what joins two stacks, final norm
and head) is replayed by running the model with its layers replaced by their recorded outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from divergence.around import Around, Tensors
from divergence.comparison import compare_tensors
from divergence.emulation import cast, reduced
from divergence.errors import one_line
from divergence.introduced import Introduced, ReplayResult
from divergence.noise import Floor, MaskOf, emulated
from divergence.precision import coarsest, coarsest_of, dtype_name
from divergence.probes import EMBEDDING, HEAD, Observation, Progress, silent
from divergence.probes.pytorch.caches import caches_in, put_cached
from divergence.probes.pytorch.layer_call import (
    LayerCall,
    replaced,
    snapshots,
)
from divergence.probes.pytorch.modes import evaluating
from divergence.probes.pytorch.observer import LayerObserver, without_hooks
from divergence.probes.pytorch.placement import device_of
from divergence.sites import Site

if TYPE_CHECKING:
    from torch import Tensor

    from divergence.probes.pytorch import PyTorchProbe


_SUSPECT = 2.0
"""Times its floor from which an introduced error may come from a layer that cannot be run again."""

_SUSPECT_FLOOR = 16.0
"""Times the least that a floor can be from which it may come from there."""

_SAME = 16.0
"""Times the least floor of its own precision up to which a layer that is run again gives what it gave."""


class Replayer:
    """Replays the layers of a reference.

    Args:
        probe: the reference, after a run with `record=True`.
        inputs: what that run was given.
        reference: the reference's tensor at a site, or None.
        candidate: the candidate's tensor at a site in the reference's layout, or None.
        precision: the candidate's.
        axes_of, mask_of: axes and valid tokens of a site's tensor.
        mixed: precisions of the candidate's parts, where they differ (`divergence.probes.RunFacts`).

    Attributes:
        around: runs what lies outside the layers.
    """

    def __init__(
        self,
        probe: PyTorchProbe,
        inputs: Mapping[str, Tensor],
        reference: Tensors,
        candidate: Tensors,
        precision: str,
        axes_of: Callable[[Site], tuple[str, ...]],
        mask_of: MaskOf,
        *,
        mixed: Mapping[str, str] | None = None,
    ) -> None:
        self._probe = probe
        self.around = Around(probe, inputs, reference, candidate)
        self._reference = reference
        self._candidate = candidate
        self._precision = precision
        self._mixed = mixed or {}
        self._own = "fp32" if next(probe.model.parameters()).dtype is torch.float32 else None
        self._axes_of = axes_of
        self._mask_of = mask_of
        self._device = device_of(probe.model)
        self._dtype = next(probe.model.parameters()).dtype
        self._repeatable: set[tuple[type, ...]] = set()

    def run(self, progress: Progress = silent) -> ReplayResult:
        """Replays every call of every layer whose input the candidate shows, then the rest."""
        found: dict[Site, Introduced] = {}
        notes: list[str] = []
        outputs = self._outside(notes)
        changed: list[str] = []
        total = len(self._probe.calls)
        with evaluating(self._probe.model), torch.inference_mode():
            for done, call in enumerate(self._probe.calls, 1):
                found.update(self._layer(call, changed))
                progress("replaying layers of the reference", done, total)
        if changed:
            notes.append(
                f"{', '.join(changed)}: on what the reference gave it the layer gives something else when it "
                "is run again (does it keep a state?); its errors are judged cumulatively"
            )
        found.update(outputs)
        return ReplayResult(found, tuple(notes))

    def _layer(self, call: LayerCall, changed: list[str]) -> dict[Site, Introduced]:
        site = call.site
        hidden = self.input_of(call)
        if hidden is None:
            return {}
        precision = self.precision_of(site)
        exact = self.run_layer(call, hidden.clone(), None)  # which may write into it
        rough = self.run_layer(call, hidden, emulated(self._own, precision))
        found = self._introduced(
            {site.with_tensor(tensor): value for tensor, value in exact.items()},
            {site.with_tensor(tensor): value for tensor, value in rough.items()},
            precision,
        )
        least = _SUSPECT_FLOOR * Floor.least(precision).rel_l2
        suspect = any(
            i.ratio is None or not i.ratio <= _SUSPECT or i.floor.rel_l2 > least for i in found.values()
        )
        if suspect and not self._can_run_again(call):
            changed.append(str(site).removesuffix(".hidden"))
            return {}
        return found

    def precision_of(self, site: Site) -> str:
        """What the candidate computes the layer of a site in, or what lies outside the layers. What comes in
        from before them belongs to the first."""
        if not self._mixed:
            return self._precision
        parts = [HEAD] if site.layer is None else [site.part]
        parts += [EMBEDDING] if not site.layer else []
        known = [self._mixed[part] for part in parts if part in self._mixed]
        return coarsest_of(known) or self._precision

    def _can_run_again(self, call: LayerCall) -> bool:
        """Whether the layer gives what it gave when it is run on what it was run on. Layers built alike are
        taken to be alike in that."""
        built = tuple(type(module) for module in call.module.modules())
        hidden = call.first_input
        if hidden is None and call.layer > 0:
            hidden = self._reference(Site(call.layer - 1, "hidden", call.stack, call.call))
        if hidden is None or built in self._repeatable:
            return True
        hidden = self._copied(call, hidden)
        least = Floor.least(coarsest([dtype_name(self._dtype)]) or "fp32")
        for tensor, value in self.run_layer(call, hidden, None, as_recorded=True).items():
            site = call.site.with_tensor(tensor)
            reference = self._reference(site)
            if reference is None or reference.shape != value.shape:
                continue
            mask = self._mask_of(site, value)
            ratio = least.ratio(compare_tensors(reference, value, axes=self._axes_of(site), mask=mask))
            if ratio is not None and not ratio <= _SAME:
                return False
        self._repeatable.add(built)
        return True

    def input_of(self, call: LayerCall) -> Tensor | None:
        """The candidate's own input to the layer `[batch, token, channel]`, None where it shows none: what
        the reference makes of the candidate's output of the layer before, for most models nothing."""
        if call.hidden_at is None:
            return None
        before = None
        if call.layer > 0:
            before = self._candidate(Site(call.layer - 1, "hidden", call.stack, call.call))
            if before is None:
                return None
        hidden = self.around.starts.get(call.key)
        if hidden is None:
            hidden = call.first_input if call.layer == 0 else before if call.follows else None
        return None if hidden is None else self._copied(call, hidden)

    def _copied(self, call: LayerCall, hidden: Tensor) -> Tensor:
        # A copy: a layer may write into its input, and captures are read again.
        return hidden.to(call.device_in or self._device, self._dtype, copy=True)

    def run_layer(
        self,
        call: LayerCall,
        hidden: Tensor,
        run_in: str | None,
        *,
        within: contextlib.AbstractContextManager[object] | None = None,
        seen: Callable[[str, Tensor], None] | None = None,
        as_recorded: bool = False,
    ) -> dict[str, Tensor]:
        """Tensors of the layer run on `hidden` `[batch, token, channel]`, by name.

        Args:
            call: which layer, and its other arguments.
            hidden: its input, which the layer may write into.
            run_in: precision to run it in, None for its own.
            within: entered around the call of the layer.
            seen: told of each tensor as it becomes known.
            as_recorded: on the reference's other arguments, and not on what the candidate makes of them.
        """
        tensors: dict[str, Tensor] = {}

        def keep(observation: Observation) -> None:
            tensors[observation.site.tensor] = observation.tensor
            if seen is not None:
                seen(observation.site.tensor, observation.tensor)

        assert call.hidden_at is not None
        args, kwargs = replaced(call.args, call.kwargs, call.hidden_at, hidden)
        for at, tensor in () if as_recorded else self.around.beside(call).items():
            args, kwargs = replaced(args, kwargs, at, tensor)
        args, kwargs = snapshots(args, kwargs, call.layer)
        if not as_recorded:
            self._give_past(call, args, kwargs)
        # Only this layer is watched, under its own index: caches are read by it.
        stacks = [stack for stack in self._probe.stacks if stack.name == call.stack]
        with contextlib.ExitStack() as active:
            active.enter_context(LayerObserver(stacks, keep, only=call.layer))
            # The arguments are what they made of them.
            active.enter_context(without_hooks([call.module], before=True))
            if run_in is not None:
                active.enter_context(reduced([call.module], run_in))
            if within is not None:
                active.enter_context(within)
            call.module(*args, **kwargs)
        return tensors

    def _give_past(self, call: LayerCall, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Puts what the candidate cached in the call before into the cache: that too is its input."""
        for tensor in ("key", "value"):
            past = self._candidate(Site(call.layer, tensor, call.stack, call.call - 1))
            if past is not None:
                put_cached(caches_in(args, kwargs), call.layer, tensor, past.to(self._dtype))

    def _outside(self, notes: list[str]) -> dict[Site, Introduced]:
        """Runs the model around its layers, on the candidate's hidden states: the model's outputs."""
        try:
            self.around.look()
            precision = self.precision_of(Site.output(""))
            _, rough = self.around.run(emulated(self._own, precision))
        except Exception as error:
            # The model does something with its layers' outputs that recorded ones do not allow.
            notes.append(
                f"what lies outside the layers could not be replayed ({one_line(error)}); "
                "its error is judged cumulatively"
            )
            self.around.give_up()
            return {}
        # An output that what the candidate's layers gave leaves as it was does not follow from it (but from
        # a cache beside them, say): its error stays cumulative.
        exact = {
            name: value for name, value in self.around.outputs.items() if not self._untouched(name, value)
        }
        self.around.outputs = {}  # logits may be large
        return self._introduced(
            {Site.output(n): v for n, v in exact.items()},
            {Site.output(n): v for n, v in rough.items()},
            precision,
        )

    def _untouched(self, name: str, value: Tensor) -> bool:
        reference = self._reference(Site.output(name))
        return reference is not None and torch.equal(value.cpu(), reference)

    def _introduced(
        self, exact: Mapping[Site, Tensor], rough: Mapping[Site, Tensor], precision: str
    ) -> dict[Site, Introduced]:
        found = {}
        run_in = emulated(self._own, precision)
        for site, value in exact.items():
            candidate = self._candidate(site)
            if candidate is None or candidate.shape != value.shape or site not in rough:
                continue
            axes, mask = self._axes_of(site), self._mask_of(site, value)
            stored = rough[site] if run_in == "fp64" else cast(rough[site], run_in)
            floor = Floor.of(compare_tensors(value, stored, axes=axes, mask=mask), precision)
            metrics = compare_tensors(value, candidate, axes=axes, mask=mask)
            found[site] = Introduced(metrics, floor)
        return found
