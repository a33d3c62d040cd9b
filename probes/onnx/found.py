"""Where a site lies in an ONNX graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from divergence.sites import Site

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Found:
    """A site and the value of the graph that holds its tensor.

    Attributes:
        site: the site.
        value: name of the value.
        axes: names of the axes of the site's tensor, after `index` and `heads` are applied.
        how: how it was found, for people.
        method: one word for it: `override`, `name`, `scope`, `value`, `pattern` or `output`.
        index: which slice of the value's first axis the site is, where it is stacked.
        heads: number of heads into which the last axis is split, where it holds all of them; the first
            axis, where `axes` begin with the batch and its heads.
        instead: the same before the model's own code scales it: the site, where the reference holds that.
    """

    site: Site
    value: str
    axes: tuple[str, ...]
    how: str
    method: str
    index: int | None = None
    heads: int | None = None
    instead: Found | None = None

    def tensor(self, value: torch.Tensor) -> torch.Tensor:
        """The site's tensor from its value: a view of it."""
        if self.index is not None:
            value = value[self.index]
        if self.heads is not None and value.dim() == 3:
            if self._folded:
                value = value.unflatten(0, (value.shape[0] // self.heads, self.heads))
            else:
                value = value.unflatten(2, (self.heads, value.shape[2] // self.heads))
        return value

    def shape(self, value: tuple[int | str, ...]) -> tuple[int | str, ...]:
        """The shape of the site's tensor from that of its value, in which sizes may be unknown."""
        value = value[1:] if self.index is not None else value
        if self.heads is None or len(value) != 3:
            return value
        size = value[0 if self._folded else 2]
        other = size // self.heads if isinstance(size, int) else "?"
        if self._folded:
            return (other, self.heads, *value[1:])
        return (*value[:2], self.heads, other)

    @property
    def _folded(self) -> bool:
        return self.axes[1:2] == ("head",)

    def axes_of(self, tensor: torch.Tensor) -> tuple[str, ...]:
        """`axes` if they fit the tensor's rank, else nothing."""
        return self.axes if len(self.axes) == tensor.dim() else ()
