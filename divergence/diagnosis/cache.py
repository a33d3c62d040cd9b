"""Keys and values as attention reads them and as a layer shows them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from divergence.diagnosis.case import Case
from divergence.diagnosis.emulate import Change, Fault, Tensors
from divergence.diagnosis.trace import Call, Handler


def changed(
    case: Case, changes: Mapping[str, Change], *, read: bool = True, handed_out: bool = True
) -> Fault:
    """The fault of changed keys and values.

    Args:
        case: the layer.
        changes: by tensor name.
        read: whether attention reads them so.
        handed_out: whether the layer shows them so.
    """

    def shown(seen: Tensors) -> Tensors:
        return {name: changes[name](t) if name in changes else t for name, t in seen.items()}

    def make() -> dict[int, Handler]:
        sources = {name: source_of(case, name) for name in changes}
        return {index: _changing(changes[name]) for name, index in sources.items() if index is not None}

    return Fault(outputs=shown if handed_out else None, operators=make if read else None)


def replaced(case: Case, tensors: Tensors, *, read: bool = True) -> Fault:
    """The fault of other keys and values in the place of the layer's; `read` as of `changed`."""

    def instead(tensor: Tensor) -> Change:
        return lambda made: tensor.to(made) if made.shape == tensor.shape else made

    return changed(case, {name: instead(tensor) for name, tensor in tensors.items()}, read=read)


def source_of(case: Case, name: str) -> int | None:
    """The last operator on the way to a site whose result has its shape and is not changed after."""
    made = case.trace.sites.get(name)
    if made is None:
        return None
    shape = tuple(case.clean[name].shape)
    near = [case.trace.operators[made], *case.trace.upstream(made)]
    fitting = [o.index for o in near if o.shape == shape]
    return max(fitting, default=None)


def _changing(change: Change) -> Handler:
    def handler(call: Call) -> object:
        made = call.run()
        return change(made) if isinstance(made, Tensor) else made

    return handler
