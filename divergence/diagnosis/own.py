"""The candidate's own weights, where it shows them under names like the reference's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


class OwnWeights:
    """Finds the candidate's weight for a parameter of the reference.

    Args:
        model: the reference.
        weights: the candidate's, by name; none where it shows none.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights
        self._is_multiplied = getattr(weights, "is_multiplied", lambda _: False)
        self._parameters = {
            id(parameter): (f"{path}.{leaf}".lstrip("."), module)
            for path, module in model.named_modules()
            for leaf, parameter in module.named_parameters(recurse=False)
        }

    def of(self, parameter: Tensor) -> Tensor | None:
        """The candidate's weight in the place of `parameter`, of the same shape and on the same device; None
        where it is not known."""
        name, owner = self._parameters.get(id(parameter), ("", None))
        found = self._named(name) if name else None
        if found is None:
            return None
        try:
            own = self._weights[found]
        except (KeyError, OSError, ValueError):  # stored in a way that is not known, or gone by now
            return None
        if self._is_multiplied(found) and isinstance(owner, torch.nn.Linear):
            own = own.T
        known = own.shape == parameter.shape and own.is_floating_point() and own.device.type != "meta"
        return own.detach().to(parameter.device) if known else None

    def _named(self, name: str) -> str | None:
        """The candidate's name for `name`."""
        if self._wrapping is None:
            return None
        left_out, put_before = self._wrapping
        if not name.startswith(left_out):
            return None
        found = put_before + name[len(left_out) :]
        return found if found in self._weights else None

    @cached_property
    def _wrapping(self) -> tuple[str, str] | None:
        """What to leave out of our names, and what to put before them: one model may be wrapped into modules
        that the other lacks. It is what most names agree on; None where that is nothing."""
        names = [name for name, _ in self._parameters.values()]
        longer: dict[str, list[str]] = {}
        for own in self._weights:
            for start in _starts(own):
                longer.setdefault(own[start:], []).append(own[:start])
        agreeing = Counter(("", before) for name in names for before in longer.get(name, ()))
        agreeing.update(
            (name[:start], "")
            for name in names
            for start in _starts(name)
            if start and name[start:] in self._weights
        )
        best = agreeing.most_common(2)
        tied = len(best) == 2 and best[0][1] == best[1][1]  # two copies of the model, say
        return best[0][0] if best and not tied else None


def _starts(name: str) -> list[int]:
    """Where the parts of a dotted name begin."""
    return [0, *(i + 1 for i, letter in enumerate(name) if letter == ".")]


def is_same(parameter: Tensor, own: Tensor) -> bool:
    """Whether `own` is the parameter, rounded to its own type at most."""
    return torch.equal(parameter.detach().to(own.dtype), own)
