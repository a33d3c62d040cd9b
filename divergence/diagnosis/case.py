"""What is known of a site where an error enters, and how well an emulated fault explains it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from divergence.diagnosis.emulate import Fault, LayerUnit, Unit
from divergence.diagnosis.trace import Trace
from divergence.sites import Site

if TYPE_CHECKING:
    from divergence.probes import RunFacts
    from divergence.result import SiteResult

ENOUGH = 0.5
"""A fault that explains no more than this is no explanation."""

WORTH_MORE = 0.3
"""A fault that explains less than this at the site is not looked at elsewhere."""

SEEN = 4.0
"""An emulated error of less than this many times the floor is taken not to show."""

MASSIVE = 30.0
"""A channel of more than this many times the median channel is a massive activation."""

_LEAST = 1e-12
_ROUNDING = 0.03  # share of a square that rounding may make up


@dataclass(frozen=True)
class Given:
    """What all cases of one comparison share.

    Attributes:
        model: the reference.
        results: every site of the comparison by name.
        reference, candidate: tensors at a site in the reference's layout, or None.
        mask_of: valid tokens `[batch, token]` of a site's tensor, or None where all count.
        axes_of: axes of a site's tensor.
        precision: what the candidate runs in.
        limit: error over floor above which a site fails.
        facts: of the candidate's run.
        inputs: the model's.
        own: the candidate's weight in the place of a parameter of the reference, or None.
    """

    model: nn.Module
    results: Mapping[str, SiteResult]
    reference: Callable[[Site], Tensor | None]
    candidate: Callable[[Site], Tensor | None]
    mask_of: Callable[[Site, Tensor], Tensor | None]
    axes_of: Callable[[Site], tuple[str, ...]]
    precision: str
    limit: float
    facts: RunFacts
    inputs: Mapping[str, Tensor]
    own: Callable[[Tensor], Tensor | None] = lambda _: None


@dataclass(frozen=True)
class Fit:
    """How well an emulated fault explains the error.

    Attributes:
        explained: share of the squared error at the case's site.
        convincing: whether more than half is explained of the error, and of the candidate's tensor itself:
            zeros
            explain half of the error of any tensor that has nothing to do with the reference's.
        each: the same at every tensor of the unit that fails.
        shown: tensors that pass although the emulation shows there, with its error over the floor.
        left: for each tensor the relative L2 error that stays unexplained, over its floor.
        overall: mean of `each`, a tensor in `shown` counting as -1.
    """

    explained: float
    convincing: bool = True
    each: Mapping[str, float] = field(default_factory=dict)
    shown: Mapping[str, float] = field(default_factory=dict)
    left: Mapping[str, float] = field(default_factory=dict)

    @property
    def overall(self) -> float:
        """See the class."""
        terms = [max(x, -1.0) for x in self.each.values()] + [-1.0] * len(self.shown)
        return sum(terms) / len(terms) if terms else self.explained


@dataclass(frozen=True)
class Case:
    """One unit of the reference (a layer, or what lies outside the layers) whose output differs.

    Attributes:
        given: what all cases share.
        unit: runs the unit.
        at: the first site of the unit that fails.
        failing: names of its tensors that fail, in execution order.
        applied: faults found before in this unit; the error that is left is looked at.
        notes: filled with what could not be tried.
        memory: what is worked out once: parts of the layer, and the number of emulations (`runs`).
    """

    given: Given
    unit: Unit
    at: Site
    failing: tuple[str, ...]
    applied: tuple[Fault, ...] = ()
    notes: list[str] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def tensor(self) -> str:
        """Name of the tensor at the site."""
        return self.at.tensor

    @property
    def result(self) -> SiteResult:
        """What the comparison says of the site."""
        return self.given.results[str(self.at)]

    @property
    def is_layer(self) -> bool:
        """Whether the unit is a layer."""
        return isinstance(self.unit, LayerUnit)

    @cached_property
    def _clean(self) -> tuple[dict[str, Tensor], Trace]:
        trace = Trace()
        with torch.inference_mode():
            return self.unit.run(self.applied, trace), trace

    @property
    def clean(self) -> Mapping[str, Tensor]:
        """The reference's tensors on the candidate's own input."""
        return self._clean[0]

    @property
    def trace(self) -> Trace:
        """The operators of the unit."""
        return self._clean[1]

    @cached_property
    def candidate(self) -> Mapping[str, Tensor]:
        """The candidate's tensors, those of equal shape."""
        found = {}
        for name, tensor in self.clean.items():
            seen = self.given.candidate(self.site_of(name))
            if seen is not None and seen.shape == tensor.shape:
                found[name] = seen.to(tensor.device)
        return found

    @cached_property
    def nonfinite(self) -> bool:
        """Whether the candidate holds NaN or Inf at the site where the reference does not, padding
        included."""
        return bool(self._lost(self.candidate[self.tensor]).any())

    def _lost(self, tensor: Tensor) -> Tensor:
        """Where `tensor` is not finite and the reference is."""
        return ~tensor.isfinite() & self.clean[self.tensor].isfinite()

    def _agreement(self, fault: Fault) -> Fit:
        """Share of the places that are not finite in the candidate or in the emulation that both share."""
        made = self._run(fault, self.trace.unchanged(fault, products=False))[self.tensor]
        seen, emulated = self._lost(self.candidate[self.tensor]), self._lost(made)
        share = float((seen & emulated).sum()) / max(1.0, float((seen | emulated).sum()))
        return Fit(share, share > ENOUGH, {self.tensor: share})

    def site_of(self, name: str) -> Site:
        """The site of another tensor of the unit."""
        return self.at.with_tensor(name) if self.at.layer is not None else Site.output(name)

    def result_of(self, name: str) -> SiteResult | None:
        """What the comparison says of another tensor of the unit."""
        return self.given.results.get(str(self.site_of(name)))

    @cached_property
    def error(self) -> Mapping[str, Tensor]:
        """Candidate minus reference, float64, zero at padding and where either is not finite."""
        return {name: self.difference(name, tensor) for name, tensor in self.candidate.items()}

    def difference(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor - clean` in float64, zero where either is not finite and at padding."""
        clean = self.clean[name]
        return (self.valid(name, tensor) - self.valid_clean(name)).where(
            tensor.isfinite() & clean.isfinite(), 0.0
        )

    def valid(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor` in float64, zero at padding and where it is not finite. Where one channel of a hidden
        state
        holds far more than the others, each channel counts in units of its own size: the rounding of a
        massive activation would bury what goes on in the others."""
        site = self.site_of(name)
        wide = tensor.to(torch.float64).nan_to_num(0.0, 0.0, 0.0)
        scale = self._channel_scale(name)
        wide = wide if scale is None else wide / scale
        if f"mask {name}" not in self.memory:
            self.memory[f"mask {name}"] = self.given.mask_of(site, tensor)
        mask: Tensor | None = self.memory[f"mask {name}"]
        axes = self.given.axes_of(site)
        if mask is None:
            return wide
        if "token" in axes:
            shape = [tensor.shape[i] if axis in ("batch", "token") else 1 for i, axis in enumerate(axes)]
        else:
            shape = [*mask.shape, *[1] * (tensor.dim() - 2)]
        return wide * mask.to(wide).reshape(shape)

    def _channel_scale(self, name: str) -> Tensor | None:
        """RMS of each channel of a hidden state with a massive activation, else None."""
        if f"scale {name}" not in self.memory:
            clean = self.clean[name]
            sizes = None
            if clean.dim() == 3 and name == "hidden":
                wide = clean.to(torch.float64).nan_to_num(0.0, 0.0, 0.0)
                sizes = wide.square().mean((0, 1)).sqrt()
                middle = float(sizes.median())
                sizes = sizes.clamp(min=middle) if float(sizes.max()) > MASSIVE * middle > 0 else None
            self.memory[f"scale {name}"] = sizes
        kept: Tensor | None = self.memory[f"scale {name}"]
        return kept

    def floor(self, name: str) -> float:
        """Noise floor of a tensor's introduced error, relative L2."""
        result = self.result_of(name)
        if result is None:
            return 0.0
        return result.introduced_floor or result.floor or 0.0

    @cached_property
    def noise(self) -> float:
        """Share of the squared error at the site that the floor alone makes up; 0 for NaN and Inf."""
        if self.nonfinite:
            return 0.0
        return min(1.0, (self.floor(self.tensor) / max(self.size, _LEAST)) ** 2)

    @cached_property
    def size(self) -> float:
        """Relative L2 error at the site."""
        return float(self.error[self.tensor].norm()) / max(
            float(self.valid_clean(self.tensor).norm()), _LEAST
        )

    @cached_property
    def is_noise(self) -> bool:
        """Whether the error could be rounding: unrelated to the reference's tensor itself."""
        clean = self.valid_clean(self.tensor)
        along = float((self.error[self.tensor] * clean).sum()) / max(float(clean.square().sum()), _LEAST)
        return abs(along) < 0.5 * self.size

    def valid_clean(self, name: str) -> Tensor:
        """`clean` in float64, zero at padding."""
        if f"clean {name}" not in self.memory:
            self.memory[f"clean {name}"] = self.valid(name, self.clean[name])
        kept: Tensor = self.memory[f"clean {name}"]
        return kept

    def fit(self, fault: Fault) -> Fit:
        """How well `fault` explains the error; where the candidate holds NaN or Inf, those."""
        if self.nonfinite:
            return self._agreement(fault)
        explained = share(self.error[self.tensor], self.emulated(fault))
        if explained < WORTH_MORE:
            return Fit(explained, convincing=False)
        faulty = self._run(fault, self.trace.unchanged(fault, products=False))
        return self.judge(
            {
                name: self.difference(name, self._like(name, faulty[name]))
                for name in self.error
                if name in faulty
            }
        )

    def judge(self, emulated: Mapping[str, Tensor]) -> Fit:
        """How well emulated errors, by tensor, explain the candidate's."""
        each = {n: share(self.error[n], emulated[n]) for n in self.failing if n in emulated}
        shown = {}
        for name, tensor in emulated.items():
            if name in self.failing:
                continue
            size = float(tensor.norm()) / max(float(self.valid_clean(name).norm()), _LEAST)
            times = size / max(self.floor(name), _LEAST)
            if times > SEEN * self.given.limit:
                shown[name] = times
        explained = each.get(self.tensor, 0.0)
        left = {
            n: float((self.error[n] - emulated[n]).norm())
            / max(float(self.valid_clean(n).norm()) * self.floor(n), _LEAST)
            for n in emulated
        }
        return Fit(explained, self._convincing(explained), each, shown, left)

    @cached_property
    def _held(self) -> float:
        """Square of the candidate's tensor at the site."""
        return float(self.valid(self.tensor, self.candidate[self.tensor]).square().sum())

    def leaves_rounding(self, fit: Fit) -> bool:
        """Whether a fault leaves no more than rounding, both of the error and of what the candidate holds at
        the site: next to the reference's tensor all that is small is zero."""
        left = (1.0 - fit.explained) * float(self.error[self.tensor].square().sum())
        return 1.0 - fit.explained <= max(_ROUNDING, 4 * self.noise) and left <= _ROUNDING * self._held

    def _convincing(self, explained: float) -> bool:
        error = float(self.error[self.tensor].square().sum())
        left = (1.0 - explained) * error
        noise = (self.floor(self.tensor) * float(self.valid_clean(self.tensor).norm())) ** 2
        return explained > ENOUGH and left < (1 - ENOUGH) * max(self._held, 4 * noise, 1e-4 * error)

    def emulated(self, fault: Fault) -> Tensor:
        """The error at the site that `fault` makes. Only what lies between the two is computed."""
        keys = self.tensor in ("key", "value", "cross_key", "cross_value")
        reuse = self.trace.unchanged(fault, products=not keys)
        for index in self.trace.skippable(self.tensor):
            reuse[index] = self.trace.results[index]
        faulty = self._run(fault, reuse)
        return self.difference(self.tensor, self._like(self.tensor, faulty[self.tensor]))

    def _like(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor` with all heads of `clean`: where heads are equal (all zero, say) probes take them for
        one."""
        clean = self.clean[name]
        if tensor.dim() == 4 and tensor.shape[1] < clean.shape[1] and clean.shape[1] % tensor.shape[1] == 0:
            return tensor.repeat_interleave(clean.shape[1] // tensor.shape[1], 1)
        return tensor

    def _run(self, fault: Fault, reuse: Mapping[int, Tensor]) -> Mapping[str, Tensor]:
        if (
            fault.outputs is not None
            and not fault.parameters
            and fault.operators is None
            and fault.hidden is None
        ):
            return fault.outputs(dict(self.clean))
        self.memory["runs"] = self.memory.get("runs", 0) + 1
        with torch.inference_mode():
            return self.unit.run((*self.applied, fault), reuse=reuse)

    def with_applied(self, fault: Fault, at: Site, failing: tuple[str, ...]) -> Case:
        """The case of what is left when `fault` is taken out."""
        return replace(self, applied=(*self.applied, fault), at=at, failing=failing, notes=[], memory={})


def share(error: Tensor, emulated: Tensor) -> float:
    """1 - |error - emulated|^2 / |error|^2; 0 where there is no error."""
    total = float(error.square().sum())
    if total == 0.0:
        return 0.0
    value = 1.0 - float((error - emulated).square().sum()) / total
    return value if math.isfinite(value) else -math.inf


def figure(value: Any) -> str:
    """A figure for a sentence: four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
