"""Which tokens are valid: those that are not padding, by the inputs, and of a captured tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from divergence.errors import InputError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from divergence.captures import Capture
    from divergence.sites import Site

_MASKS = {
    "attention_mask": "attention_mask",
    "decoder_attention_mask": "decoder_attention_mask",
    "key_padding_mask": "attention_mask",
    "src_key_padding_mask": "attention_mask",
    "tgt_key_padding_mask": "decoder_attention_mask",
}
"""Inputs that are masks, and what transformers calls them; torch's own modules have True at padding."""

_NOT = "not "
_MODALITIES = ("vision", "visual", "image", "video", "audio", "speech")


def token_masks(
    inputs: Mapping[str, Tensor], stacks: Iterable[str], mask: str | None = None
) -> dict[str, Tensor]:
    """Which tokens are valid, by stack.

    `attention_mask` counts for every stack, under the name `""`, but where there are several:

    - with encoders among them (T5, Whisper) it belongs to these, and `decoder_attention_mask`, if
      there is one, to the decoders;
    - a stack of another modality (named after vision, audio, ...) has tokens of its own.

    What torch's own modules call `key_padding_mask` or `src_key_padding_mask` is an `attention_mask` the
    other way round, and `tgt_key_padding_mask` a `decoder_attention_mask`.

    A stack without a mask, of its own or under `""`, has valid tokens only. A mask may be longer than
    a run's tokens where it covers cached ones: these come first.

    Args:
        inputs: the run's inputs. A mask is `[batch, token]`, of booleans, of integers (0 is padding) or of
            floats 0 and 1; masks of other ranks and additive ones are passed over, as are floats under one
            of torch's names, where they are additive.
        stacks: names of the layer stacks.
        mask: name of the input that is the mask of all stacks, instead of the above; `not NAME` where it is
            0 at valid tokens.

    Returns:
        Boolean masks `[batch, token]`, true at valid tokens.

    Raises:
        InputError: `mask` is no input or no mask, or a mask leaves no token valid.
    """
    if mask is not None:
        return {"": _named(mask, inputs)}
    given = _given(inputs)
    names = list(stacks)
    masks: dict[str, Tensor] = {}
    if len(names) <= 1:
        only = given.get("attention_mask", given.get("decoder_attention_mask"))
        return {} if only is None else {"": only}
    text = [name for name in names if not any(word in name for word in _MODALITIES)]
    encoders = [name for name in text if "encoder" in name]
    decoders = [name for name in text if "decoder" in name]
    if "attention_mask" in given:
        if encoders:
            masks.update(dict.fromkeys(encoders, given["attention_mask"]))
        elif len(text) == len(names):
            masks[""] = given["attention_mask"]
        else:
            masks.update(dict.fromkeys(text, given["attention_mask"]))
    if "decoder_attention_mask" in given:
        masks.update(dict.fromkeys(decoders, given["decoder_attention_mask"]))
    return masks


def _given(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks among the inputs by what transformers calls them."""
    given: dict[str, Tensor] = {}
    for name, known in _MASKS.items():
        tensor, torchs = inputs.get(name), name.endswith("padding_mask")
        if tensor is None or known in given or (torchs and tensor.is_floating_point()):
            continue
        found = _as_mask(name, tensor, inverted=torchs)
        if found is not None:
            given[known] = found
    return given


def _named(mask: str, inputs: Mapping[str, Tensor]) -> Tensor:
    name = mask.removeprefix(_NOT).strip()
    if name not in inputs:
        raise InputError(f"mask '{name}' is not an input{nearest(name, inputs)}")
    found = _as_mask(name, inputs[name], inverted=mask.startswith(_NOT))
    if found is None:
        raise InputError(
            f"mask '{name}' has shape {list(inputs[name].shape)} and dtype {inputs[name].dtype}; a mask is "
            f"[batch, token] and holds 0 at padding and 1 elsewhere, or the reverse for 'not {name}'"
        )
    return found


def _as_mask(name: str, tensor: Tensor, *, inverted: bool) -> Tensor | None:
    """`tensor` as a boolean mask, or None where it is none."""
    if tensor.ndim != 2 or tensor.is_complex():
        return None
    if tensor.is_floating_point() and not bool(((tensor == 0) | (tensor == 1)).all()):
        return None
    found = (tensor == 0) if inverted else (tensor != 0)
    if not bool(found.any()):
        raise InputError(f"input '{name}' marks every token as padding, which leaves nothing to compare")
    return found


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
