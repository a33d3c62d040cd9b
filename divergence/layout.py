"""Layouts: how a candidate's tensor is brought into the layout of its reference, by views only.

Axes are told apart by their names where both sides know them. Where not, every reading of the
candidate's sizes that gives the reference's shape is listed, and one is taken only if all others
amount to the same. Readings that no runtime is known to write are left out as long as another is
there: the channel axis is last, the layer and the key/value axis come before heads, tokens and
channels, and the batch comes before the heads.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STACKED = ("layer", "pair")
"""Axes that stack tensors of several sites: of the layers, and of key and value."""

_BEFORE = (
    *((stacked, name) for stacked in STACKED for name in ("head", "token", "channel")),
    ("batch", "head"),
)
_SPOKEN = {"batch": "batch", "head": "heads", "token": "sequence", "channel": "channels"}


@dataclass(frozen=True)
class Select:
    """Takes one entry of an axis that stacks several sites."""

    axis: int
    index: int
    stacked: str
    name: str

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The entry, one axis less."""
        return tensor.select(self.axis, self.index)

    def __str__(self) -> str:
        meaning = "layer" if self.stacked == "layer" else "choice of key or value"
        return f"axis {self.axis} of {self.name} is the {meaning}"


@dataclass(frozen=True)
class Squeeze:
    """Drops an axis of size 1."""

    axis: int

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor without the axis."""
        return tensor.squeeze(self.axis)

    def __str__(self) -> str:
        return f"axis {self.axis} of size 1 dropped"


@dataclass(frozen=True)
class Unsqueeze:
    """Adds an axis of size 1 in front."""

    name: str

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with the axis."""
        return tensor.unsqueeze(0)

    def __str__(self) -> str:
        return f"{self.name} axis of size 1 added"


@dataclass(frozen=True)
class Split:
    """Splits heads that are folded into the channels, `[..., h * d]` -> `[..., h, d]`."""

    axis: int
    heads: int

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with heads before channels."""
        size = tensor.shape[self.axis] // self.heads
        shape = (*tensor.shape[: self.axis], self.heads, size, *tensor.shape[self.axis + 1 :])
        return tensor.view(shape)

    def __str__(self) -> str:
        return f"{self.heads} heads folded into the channels"


@dataclass(frozen=True)
class Permute:
    """Puts axes into the reference's order.

    Attributes:
        order: as for `torch.permute`.
        names: names of the candidate's axes in its own order.
    """

    order: tuple[int, ...]
    names: tuple[str, ...]

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in the reference's order."""
        return tensor.permute(self.order)

    def __str__(self) -> str:
        moved = [self.names[axis] for place, axis in enumerate(self.order) if place != axis]
        if sorted(moved) == ["head", "token"]:
            return "heads after sequence"
        return "axes in the order " + ", ".join(_SPOKEN.get(name, name) for name in self.names)


@dataclass(frozen=True)
class Every:
    """Takes one of every `repeats` heads, which repeat one head of the reference.

    Attributes:
        axis: of the heads.
        repeats: how often each is repeated.
        first: which of the repeats is taken.
        equal: whether all of them are the same, which is for the caller to check
            (`divergence.repeats`).
    """

    axis: int
    repeats: int
    first: int = 0
    equal: bool = True

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The taken one of each run of repeated heads."""
        return tensor[(slice(None),) * self.axis + (slice(self.first, None, self.repeats),)]

    def __str__(self) -> str:
        if self.equal:
            return f"key/value heads repeated {self.repeats} times, the first of each compared"
        return (
            f"key/value heads repeated {self.repeats} times, not equally: repeat {self.first + 1} of each "
            "compared, the furthest from the reference"
        )


@dataclass(frozen=True)
class Repeat:
    """Repeats each head `repeats` times: the candidate's are so much alike (all zero, say) that its
    probe took them for copies of one, and dropped them. The only step that copies."""

    axis: int
    repeats: int

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with the reference's number of heads."""
        return tensor.repeat_interleave(self.repeats, self.axis)

    def __str__(self) -> str:
        return f"{self.repeats} key/value heads of the reference compared with each of the candidate's"


Step = Select | Squeeze | Unsqueeze | Split | Permute | Every | Repeat


@dataclass(frozen=True)
class Layout:
    """What is done to a candidate's tensor to bring it into its reference's layout.

    Attributes:
        steps: in order; each is a view, but for `Repeat`.
        note: a remark on how the pair was found.
    """

    steps: tuple[Step, ...] = ()
    note: str = ""

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """The candidate's `tensor` in the layout of its reference: a view, unless heads are repeated."""
        for step in self.steps:
            tensor = step.apply(tensor)
        return tensor

    @property
    def repeats(self) -> Every | None:
        """The step that takes one of repeated heads, if there is one."""
        return next((step for step in self.steps if isinstance(step, Every)), None)

    def __str__(self) -> str:
        return "; ".join([*map(str, self.steps), *([self.note] if self.note else [])])


class MisfitError(Exception):
    """A candidate's tensor that cannot be brought into its reference's layout, and why in words."""


class AmbiguousError(MisfitError):
    """A candidate's tensor whose sizes can be read in several ways."""


@dataclass(frozen=True)
class Axes:
    """Axes of a tensor.

    Attributes:
        names: of each axis, or nothing where unknown.
        sizes: of each axis.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        named = f" ({', '.join(self.names)})" if self.names else ""
        return f"{list(self.sizes)}{named}"


def between(
    ref: Axes,
    cand: Axes,
    *,
    name: str,
    stacked: Mapping[str, tuple[int, int]] | None = None,
    repeated: bool = False,
) -> Layout:
    """The layout that brings a candidate's tensor into its reference's.

    Args:
        ref: axes of the reference, named.
        cand: axes of the candidate.
        name: of the candidate's site, for words.
        stacked: for `layer` and `pair` the size of that axis of the candidate and the entry to take.
        repeated: whether the candidate may repeat each head (grouped-query attention unrolled).

    Raises:
        MisfitError: there is none.
        AmbiguousError: there are several that differ.
    """
    stacked = stacked or {}
    names = cand.names
    if not names:
        sizes = tuple((axis, size) for axis, (size, _) in stacked.items())
        names = _read(ref, cand.sizes, sizes, repeated=repeated)
    return Layout(tuple(_steps(ref, Axes(names, cand.sizes), name, stacked, repeated=repeated)))


def _steps(
    ref: Axes, cand: Axes, name: str, stacked: Mapping[str, tuple[int, int]], *, repeated: bool
) -> Iterator[Step]:
    want = dict(zip(ref.names, ref.sizes, strict=True))
    names, sizes = list(cand.names), list(cand.sizes)
    for axis in reversed(range(len(names))):
        entries, index = stacked.get(names[axis], (0, 0))
        if entries and sizes[axis] == entries:
            yield Select(axis, index, names[axis], name)
            del names[axis], sizes[axis]
    for axis in reversed(range(len(names))):
        if names[axis] not in want and sizes[axis] == 1:
            yield Squeeze(axis)
            del names[axis], sizes[axis]
    channel = names.index("channel") if "channel" in names else None
    if "head" in want and "head" not in names and channel is not None:
        heads = want["head"]
        if sizes[channel] == heads * want.get("channel", 0):
            yield Split(channel, heads)
            names.insert(channel, "head")
            sizes[channel : channel + 1] = [heads, sizes[channel] // heads]
    for missing in [axis for axis in ref.names if axis not in names and want[axis] == 1]:
        yield Unsqueeze(missing)
        names.insert(0, missing)
        sizes.insert(0, 1)
    if sorted(names) != sorted(ref.names) or not stacked.keys() <= set(cand.names):
        raise MisfitError(f"reference {ref}, candidate {cand}")
    order = tuple(names.index(axis) for axis in ref.names)
    if order != tuple(range(len(order))):
        yield Permute(order, tuple(names))
    final = dict(zip(names, sizes, strict=True))
    wrong = [axis for axis in ref.names if final[axis] != want[axis]]
    if wrong == ["head"] and repeated and want["head"] and final["head"] % want["head"] == 0:
        yield Every(ref.names.index("head"), final["head"] // want["head"])
    elif wrong == ["head"] and repeated and cand.names and want["head"] % final["head"] == 0:
        yield Repeat(ref.names.index("head"), want["head"] // final["head"])
    elif wrong:
        differ = ", ".join(f"{axis} {want[axis]} against {final[axis]}" for axis in wrong)
        raise MisfitError(f"reference {ref}, candidate {cand}: {differ}")


@functools.lru_cache(maxsize=256)
def _read(
    ref: Axes, sizes: tuple[int, ...], stacked: tuple[tuple[str, int], ...], *, repeated: bool
) -> tuple[str, ...]:
    """Names of a candidate's axes from their sizes; an axis of size 1 with no meaning is called "".

    Raises:
        MisfitError: no names fit.
        AmbiguousError: several fit that differ in more than axes of size 1.
    """
    for folded, unrolled in ((False, False), (True, False), (False, True)):
        if unrolled and not repeated:
            continue
        found = list(_readings(ref, sizes, dict(stacked), folded=folded, repeated=unrolled))
        usual = [names for names in found if _is_usual(names)] or found
        distinct = {
            tuple(n for n, size in zip(names, sizes, strict=True) if size != 1): names for names in usual
        }
        if len(distinct) > 1:
            first, second, *_ = (", ".join(n or "1" for n in names) for names in distinct.values())
            raise AmbiguousError(
                f"its axes are ambiguous: {list(sizes)} can be read as ({first}) and as ({second}) of the "
                f"reference's {ref}"
            )
        if distinct:
            # Of readings that amount to the same, the one nearest to the reference's order.
            return max(usual, key=lambda names: [a == b for a, b in zip(names, ref.names, strict=False)])
    raise MisfitError(f"reference {ref}, candidate {list(sizes)}")


def _readings(
    ref: Axes, sizes: tuple[int, ...], stacked: dict[str, int], *, folded: bool, repeated: bool
) -> Iterator[tuple[str, ...]]:
    """All ways to name axes of `sizes`.

    Args:
        ref: axes of the reference.
        sizes: of the candidate.
        stacked: sizes of the stacked axes, which must all be there.
        folded: heads are folded into the channels.
        repeated: each head is repeated, at least twice.
    """
    want = {**stacked, **dict(zip(ref.names, ref.sizes, strict=True))}
    if (folded or repeated) and not {"head", "channel"} <= set(want):
        return
    heads = want.get("head", 1)
    if folded:
        want["channel"] *= want.pop("head")

    def fits(name: str, size: int) -> bool:
        if name == "head" and repeated:
            return size > heads and size % heads == 0
        return size == want[name]

    def extend(names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if len(names) == len(sizes):
            left = [n for n in want if n not in names]
            if all(want[n] == 1 and n not in stacked for n in left):
                yield names
            return
        size = sizes[len(names)]
        for name in want:
            if name not in names and fits(name, size):
                yield from extend((*names, name))
        if size == 1:
            yield from extend((*names, ""))

    yield from extend(())


def _is_usual(names: tuple[str, ...]) -> bool:
    place = {name: axis for axis, name in enumerate(names)}
    if place.get("channel", len(names) - 1) != len(names) - 1:
        return False
    return all(place[a] < place[b] for a, b in _BEFORE if a in place and b in place)
