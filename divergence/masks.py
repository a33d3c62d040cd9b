"""Which tokens of a captured tensor are valid."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from divergence.captures import Capture
    from divergence.sites import Site


def valid_tokens(capture: Capture, site: Site, tensor: Tensor) -> Tensor | None:
    """The mask `[batch, token]` of valid tokens for `tensor` at `site`, or None where all count.

    A mask that covers cached tokens too ends with the tensor's own; one of another length belongs to
    something else and does not apply.
    """
    entry = capture.entries.get(site)
    if entry is None or "token" not in entry.axes:
        # Model outputs: [batch, token, channel] by convention, if the mask fits.
        axis = 1 if site.layer is None and tensor.dim() == 3 else None
    else:
        axis = entry.axes.index("token")
    if axis is None:
        return None
    stack = site.stack
    if site.tensor.startswith("cross_"):
        stack = next((name for name in capture.masks if "encoder" in name), "")
    mask = capture.mask(stack)
    tokens = tensor.shape[axis]
    if mask is None or mask.shape[0] != tensor.shape[0] or mask.shape[1] < tokens:
        return None
    return mask[:, mask.shape[1] - tokens :]
