"""Alignment: which tensor of the candidate answers which of the reference, and in which layout.

Sites pair by their address. Where the candidate lacks a site of a layer, it may have the tensors of
all layers in one output (`output.keys` `[layer, batch, head, token, channel]`), which is taken
apart. Outputs that are called differently pair where each is the only one of its shape. Nothing is paired
by position, by similar names or by values: those are suggestions only, and a site without a partner is
reported.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from divergence.errors import AlignmentError, ConfigurationError, counted, nearest
from divergence.layout import STACKED, AmbiguousError, Axes, Layout, MisfitError, between
from divergence.result import State, Unmatched
from divergence.sites import HEAD_AXES, Site, matches
from divergence.stack_pairs import layers_and_width, renamed_stacks
from divergence.stacked import named_stack, role

_REPEATABLE = frozenset({"key", "value", "cross_key", "cross_value"})
_NAME_AXES = (
    "; name its axes in divergence.toml, in their order: [sources.NAME.axes] "
    '"SITE" = ["batch", "head", "token", "channel"]'
)
_NAME_STACK = "; name the output after its stack when exporting, such as '{stack}_{output}'"


class Described(Protocol):
    """What is known of a tensor; `divergence.captures.Entry` is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def axes(self) -> tuple[str, ...]:
        """Name of each axis, or nothing where unknown."""


@dataclass(frozen=True)
class Pair:
    """A site of the reference and the candidate's tensor to compare with it."""

    reference: Site
    candidate: Site
    layout: Layout


@dataclass(frozen=True)
class Alignment:
    """What is compared with what.

    Attributes:
        pairs: in the order of the reference.
        unmatched: sites that are not compared and why, the reference's first.
    """

    pairs: tuple[Pair, ...]
    unmatched: tuple[Unmatched, ...]


def align(
    reference: Mapping[Site, Described],
    candidate: Mapping[Site, Described],
    *,
    exclude: Sequence[str] = (),
    overrides: Mapping[str, str] | None = None,
    axes: Mapping[str, Sequence[str]] | None = None,
) -> Alignment:
    """Pairs the sites of a candidate with those of a reference.

    Args:
        reference: the reference's tensors, in execution order.
        candidate: the candidate's tensors.
        exclude: patterns of sites that are not compared.
        overrides: site of the reference by site of the candidate, where the addresses do not say it.
        axes: names of a candidate tensor's axes by site pattern, from `batch`, `head`, `token`,
            `channel`, `layer` (stacks the layers) and `pair` (stacks key and value).

    Raises:
        AlignmentError: nothing corresponds, or these are two different models.
        ConfigurationError: `overrides` names a site that is not there, or `axes` does not fit.
    """
    return _Aligner(reference, candidate, exclude, overrides or {}, axes or {}).run()


@dataclass(frozen=True)
class _Offer:
    """A candidate's tensor that may answer a site of the reference.

    Attributes:
        site: of the tensor.
        stacked: size of its axis of layers (and of key and value), and the entry to take.
        note: how it was found.
        rivals: other stacks of the reference whose layers it may hold just as well.
    """

    site: Site
    stacked: Mapping[str, tuple[int, int]]
    note: str = ""
    rivals: tuple[str, ...] = ()


class _Aligner:
    """One alignment under way."""

    def __init__(
        self,
        reference: Mapping[Site, Described],
        candidate: Mapping[Site, Described],
        exclude: Sequence[str],
        overrides: Mapping[str, str],
        axes: Mapping[str, Sequence[str]],
    ) -> None:
        self.reference = reference
        self.candidate = candidate
        self.exclude = exclude
        self.named = {site: _given_axes(site, entry, axes) for site, entry in candidate.items()}
        self.overrides = {
            _find(ref, reference, "reference"): _find(cand, candidate, "candidate")
            for cand, ref in overrides.items()
        }
        if len(self.overrides) != len(overrides):
            raise ConfigurationError(
                "two sites of the candidate are mapped to one of the reference; keep one"
            )
        self.stacks = dict.fromkeys(site.stack for site in reference if site.layer is not None)
        theirs = dict.fromkeys(site.stack for site in candidate if site.layer is not None)
        self.renamed = renamed_stacks(list(self.stacks), list(theirs), reference, candidate)
        alone = len(self.stacks) == len(theirs) == 1
        self._only = "the only stack of each side" if alone else "the only stacks of one shape"
        self.shared = [s for s in self.stacks if self.renamed.get(s, s) in theirs]
        self.used: set[Site] = set()
        self.pairs: list[Pair] = []
        self.open: list[tuple[Site, State, str]] = []

    def run(self) -> Alignment:
        """Pairs everything."""
        for side, sites in (("reference", self.reference), ("candidate", self.candidate)):
            if not sites:
                raise AlignmentError(f"the {side} has no sites, so there is nothing to compare")
        for site in self.reference:
            pattern = self._excluded(site)
            if pattern is not None:
                self.open.append((site, "excluded", f"excluded by '{pattern}'"))
                self.used.update(offer.site for offer in self._offers(site) if not offer.stacked)
            else:
                self._pair(site)
        self._refuse_strangers()
        unmatched = [
            Unmatched(str(site), state, reason, "" if state == "excluded" else self._suggestion(site))
            for site, state, reason in self.open
        ]
        return Alignment(tuple(self.pairs), (*unmatched, *self._left_over()))

    def _excluded(self, site: Site) -> str | None:
        return next((pattern for pattern in self.exclude if matches(site, pattern)), None)

    def _pair(self, site: Site) -> None:
        misfits: list[str] = []
        state: State = "missing in candidate"
        for offer in self._offers(site):
            try:
                layout = self._layout(site, offer)
            except MisfitError as misfit:
                unclear = isinstance(misfit, AmbiguousError)
                hint = _NAME_STACK.format(stack=site.stack, output=offer.site.tensor)
                hint = (hint if offer.rivals else _NAME_AXES) if unclear else ""
                misfits.append(f"{offer.site}: {misfit}{hint}")
                if unclear or not offer.stacked:
                    state = "shape mismatch"
                    self.used.add(offer.site)
            else:
                self.used.add(offer.site)
                self.pairs.append(Pair(site, offer.site, layout))
                return
        reason = "; ".join(misfits)
        if state == "missing in candidate":
            reason = (
                f"the candidate has no tensor at this site{', nor stacks it: ' if misfits else ''}{reason}"
            )
        self.open.append((site, state, reason))

    def _layout(self, site: Site, offer: _Offer) -> Layout:
        if offer.rivals:
            raise AmbiguousError(
                f"its shape {list(self.candidate[offer.site].shape)} fits the layers of "
                f"{' and of '.join(map(_stack, (site.stack, *offer.rivals)))}"
            )
        ref, cand = self.reference[site], Axes(self.named[offer.site], self.candidate[offer.site].shape)
        names = ref.axes
        if not names:
            if site.layer is None or len(site.axes) != len(ref.shape):
                if ref.shape == cand.sizes:
                    return Layout(note=offer.note)
                names = tuple(f"axis {axis}" for axis in range(len(ref.shape)))
                cand = replace(cand, names=())
            else:
                names = site.axes
        repeated = site.tensor in _REPEATABLE and site.layer is not None
        layout = between(
            Axes(names, ref.shape), cand, name=str(offer.site), stacked=offer.stacked, repeated=repeated
        )
        return replace(layout, note=offer.note)

    def _offers(self, site: Site) -> list[_Offer]:
        """The candidate's tensors that may answer `site`, best first."""
        if site in self.overrides:
            return [_Offer(self.overrides[site], {}, "mapped by the configuration")]
        own = site
        note = ""
        if site.layer is not None and site.stack in self.renamed:
            theirs = self.renamed[site.stack]
            own = replace(site, stack=theirs)
            note = f"{self._only}: {_stack(theirs)} is the reference's {_stack(site.stack)}"
        if own in self.candidate:
            return [_Offer(own, {}, note)]
        return self._output_like(site) if site.layer is None else self._stacks_of(site)

    def _output_like(self, site: Site) -> list[_Offer]:
        """The candidate's output of the shape of `site`, an output, if there is one on each side that has no
        other partner: a tuple numbers what a dict and a graph name."""
        shape = self.reference[site].shape
        ours, theirs = (
            [s for s in mine if s.layer is None and s not in others and mine[s].shape == shape]
            for mine, others in ((self.reference, self.candidate), (self.candidate, self.reference))
        )
        if len(ours) != 1 or len(theirs) != 1:
            return []
        return [_Offer(theirs[0], {}, f"{theirs[0]}, the only output of its shape on each side")]

    def _stacks_of(self, site: Site) -> list[_Offer]:
        """The candidate's outputs that may hold the tensors of all layers at `site`: those named after
        its stack, or after none; of these, the layer count and sizes must tell the stack."""
        offers = []
        for output in self.candidate:
            offer = self._stack_offer(site, output)
            if offer is None:
                continue
            named = named_stack(output.tensor, self.stacks)
            if named is None and len(self.stacks) > 1:
                offer = self._by_shape(site, offer)
            if named in (None, site.stack):
                offers.append(offer)
        return offers

    def _stack_offer(self, site: Site, output: Site) -> _Offer | None:
        """`output` as the tensors of all layers at `site`, if its name says that it stacks such."""
        held = role(output.tensor) if output.layer is None and output.call == site.call else {}
        if site.tensor not in held:
            return None
        layers = [s.layer for s in self.reference if replace(s, layer=site.layer) == site]
        stacked = {"layer": (len(layers), layers.index(site.layer))}
        pair = held[site.tensor]
        if pair is not None:
            stacked["pair"] = (2, pair)
        return _Offer(output, stacked)

    def _by_shape(self, site: Site, offer: _Offer) -> _Offer:
        """`offer` with the other stacks of the reference that its tensor fits as well as it fits `site`'s."""
        if not self._fits(site, offer):
            return offer
        others = {
            s.stack: s for s in self.reference if replace(s, stack=site.stack, layer=site.layer) == site
        }
        rivals = []
        for stack, other in others.items():
            theirs = self._stack_offer(other, offer.site) if stack != site.stack else None
            if theirs is not None and self._fits(other, theirs):
                rivals.append(stack)
        return replace(offer, rivals=tuple(rivals), note=f"by its shape, the layers of {_stack(site.stack)}")

    def _fits(self, site: Site, offer: _Offer) -> bool:
        try:
            self._layout(site, offer)
        except AmbiguousError:
            return True
        except MisfitError:
            return False
        return True

    def _left_over(self) -> list[Unmatched]:
        """The candidate's sites that answer nothing."""
        left = []
        for site in self.candidate:
            if site in self.used:
                continue
            pattern = self._excluded(site)
            if pattern is not None:
                left.append(Unmatched(str(site), "excluded", f"excluded by '{pattern}'"))
            elif site in self.overrides:
                reason = f"the configuration maps {self.overrides[site]} to this site instead"
                left.append(Unmatched(str(site), "excluded", reason))
            else:
                left.append(
                    Unmatched(str(site), "missing in reference", "the reference has no tensor at this site")
                )
        return left

    def _suggestion(self, site: Site) -> str:
        """Names the candidate's spare site that is most like `site`: in shape first, then in name."""
        spare = [s for s in self.candidate if s not in self.used and self._excluded(s) is None]
        shape = self.reference[site].shape
        same = [s for s in spare if sorted(self.candidate[s].shape) == sorted(shape)]
        if not same:
            found = difflib.get_close_matches(str(site), [str(s) for s in spare], n=1, cutoff=0.5)
            return f"the candidate's {found[0]} has a similar name but another shape" if found else ""
        best = max(same, key=lambda s: difflib.SequenceMatcher(None, str(site), str(s)).ratio())
        own = best.tensor if best.layer is None else str(best)
        return (
            f"the candidate's {best} has shape {list(self.candidate[best].shape)}; if it is this tensor, say "
            f'so in divergence.toml: [sources.NAME.sites] "{site}" = "{own}"'
        )

    def _refuse_strangers(self) -> None:
        """Raises where comparing makes no sense."""
        ours = layers_and_width(self.reference, self.shared)
        theirs = layers_and_width(self.candidate, [self.renamed.get(s, s) for s in self.shared])
        if ours and theirs and ours[1] != theirs[1] and (ours[0] != theirs[0] or self._no_layer_fits()):
            raise AlignmentError(
                f"the candidate has {counted(theirs[0], 'layer')} of {theirs[1]} channels, the reference "
                f"{ours[0]} of {ours[1]}: these are different models"
            )
        if self.pairs:
            return
        wrong = [(site, reason) for site, state, reason in self.open if state == "shape mismatch"]
        if wrong:
            site, reason = wrong[0]
            raise AlignmentError(
                f"nothing can be compared: {site} of the reference against the candidate's {reason}"
            )
        if all(state == "excluded" for _, state, _ in self.open):
            raise AlignmentError("every site of the reference is excluded, so there is nothing to compare")
        raise AlignmentError(
            f"nothing corresponds: the reference has {_listed(self.reference)}, the candidate "
            f"{_listed(self.candidate)}; map them in divergence.toml under [sources.NAME.sites]"
        )

    def _no_layer_fits(self) -> bool:
        """Whether both sides have the layers' sites, none is excluded, and not one has a partner."""
        paired = any(pair.reference.layer is not None for pair in self.pairs)
        states = {state for site, state, _ in self.open if site.layer is not None}
        return not self.pairs or (not paired and "shape mismatch" in states and "excluded" not in states)


def _find(text: str, sites: Mapping[Site, Described], side: str) -> Site:
    site = Site.parse(text)
    if site not in sites:
        raise ConfigurationError(f"the {side} has no site '{text}'{nearest(text, [str(s) for s in sites])}")
    return site


def _given_axes(site: Site, entry: Described, axes: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    given = [tuple(names) for pattern, names in axes.items() if matches(site, pattern)]
    if not given:
        return tuple(entry.axes)
    names = given[-1]
    known = (*HEAD_AXES, *STACKED)
    if len(names) != len(entry.shape) or len(set(names)) != len(names) or not set(names) <= set(known):
        raise ConfigurationError(
            f"axes {list(names)} do not name the axes of {site}, which has shape {list(entry.shape)}; "
            f"give each one of {', '.join(known)}, none twice"
        )
    return names


def _listed(sites: Iterable[Site]) -> str:
    names = [str(site) for site in sites]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _stack(name: str) -> str:
    return f"'{name}'" if name else "unnamed one"
