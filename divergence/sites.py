"""Sites: addresses of tensors that exist in every implementation of a model.

A site is written `layers.3.key`, `vision.layers.3.hidden` where a model has several
stacks, `layers.3.hidden@2` for the second call of a layer within one run, and
`output.logits` for one of the model's own outputs.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass

from divergence.errors import ConfigurationError

# Execution order within one layer: keys and values are computed before attention reads them,
# attention before the MLP, and the layer's output (hidden) last.
LAYER_TENSORS = (
    "input_norm",
    "query",
    "key",
    "value",
    "attention",
    "cross_key",
    "cross_value",
    "cross_attention",
    "post_norm",
    "mlp",
    "hidden",
)
DEFAULT_TENSORS = ("key", "value", "cross_key", "cross_value", "hidden")
DETAIL_TENSORS = tuple(t for t in LAYER_TENSORS if t not in DEFAULT_TENSORS)

HIDDEN_AXES = ("batch", "token", "channel")
HEAD_AXES = ("batch", "head", "token", "channel")
KEYS_AND_VALUES = (("key", "value"), ("cross_key", "cross_value"))
"""Names of the key and the value of a layer's attention, and of its cross-attention."""

_HEAD_TENSORS = frozenset({"query", *(name for pair in KEYS_AND_VALUES for name in pair)})

_PATTERN = re.compile(r"^(?:(?P<stack>.+)\.)?layers\.(?P<layer>\d+)\.(?P<tensor>[a-z_]+)(?:@(?P<call>\d+))?$")
_OUTPUT = re.compile(r"^output\.(?P<name>.+?)(?:@(?P<call>\d+))?$")


@dataclass(frozen=True)
class Site:
    """The address of one tensor.

    Attributes:
        layer: index of the layer in its stack, or None for a model output.
        tensor: one of `LAYER_TENSORS`, or the name of a model output.
        stack: name of the layer stack; empty where the model has a single one.
        call: 1 for the first call of the layer within a run, 2 for the second, ...
    """

    layer: int | None
    tensor: str
    stack: str = ""
    call: int = 1

    def __str__(self) -> str:
        suffix = f"@{self.call}" if self.call != 1 else ""
        if self.layer is None:
            return f"output.{self.tensor}{suffix}"
        prefix = f"{self.stack}." if self.stack else ""
        return f"{prefix}layers.{self.layer}.{self.tensor}{suffix}"

    @property
    def part(self) -> str:
        """The layer that it belongs to, whichever the call: `layers.3`; empty for a model output."""
        return str(Site(self.layer, "", self.stack)).removesuffix(".") if self.layer is not None else ""

    @classmethod
    def output(cls, name: str, call: int = 1) -> Site:
        """The site of the model output `name`."""
        return cls(layer=None, tensor=name, call=call)

    @classmethod
    def parse(cls, text: str) -> Site:
        """Reads a site back from its text.

        Raises:
            ConfigurationError: `text` is not a site.
        """
        if match := _OUTPUT.match(text):
            return cls.output(match["name"], int(match["call"] or 1))
        match = _PATTERN.match(text)
        if match is None or match["tensor"] not in LAYER_TENSORS:
            raise ConfigurationError(
                f"'{text}' is not a site; write it as layers.N.TENSOR with TENSOR one of "
                f"{', '.join(LAYER_TENSORS)}, or as output.NAME"
            )
        return cls(int(match["layer"]), match["tensor"], match["stack"] or "", int(match["call"] or 1))

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of this site's tensor in canonical layout; empty for a model output."""
        if self.layer is None:
            return ()
        return HEAD_AXES if self.tensor in _HEAD_TENSORS else HIDDEN_AXES

    def with_tensor(self, tensor: str) -> Site:
        """The site of another tensor of the same layer call."""
        return Site(self.layer, tensor, self.stack, self.call)


def matches(site: Site, pattern: str) -> bool:
    """Whether `site` matches the shell-style `pattern` (`layers.*.key`); a pattern without
    `@` matches every call."""
    text = str(site)
    if fnmatch.fnmatchcase(text, pattern):
        return True
    return "@" not in pattern and fnmatch.fnmatchcase(text.split("@", maxsplit=1)[0], pattern)


def patterns_of(given: object, where: str = "exclude") -> tuple[str, ...]:
    """The patterns of sites in `given`, several or one text.

    Raises:
        ConfigurationError: one is empty or no text; the message begins with `where`.
    """
    several = given if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    patterns = []
    for pattern in several:
        if not isinstance(pattern, str) or not pattern.strip():
            raise ConfigurationError(f"{where}: {pattern!r} is no pattern of sites such as 'layers.*.key'")
        patterns.append(pattern)
    return tuple(patterns)


def in_execution_order(sites: Iterable[Site], stacks: Iterable[str] = ()) -> list[Site]:
    """Sorts `sites` by execution order: call, stack (in the order given), layer, tensor;
    model outputs last."""
    rank = {stack: i for i, stack in enumerate(stacks)}

    def key(site: Site) -> tuple[bool, int, int, str, int, int, str]:
        if site.layer is None:
            return (True, site.call, 0, "", 0, 0, site.tensor)
        stack = rank.get(site.stack, len(rank))
        return (False, site.call, stack, site.stack, site.layer, LAYER_TENSORS.index(site.tensor), "")

    return sorted(sites, key=key)


def name_stacks(paths: Iterable[str]) -> dict[str, str]:
    """Names layer stacks from the module paths of the lists that hold their layers.

    A single stack is called "". Of several, each is called by the first path component that
    tells them apart, so that an export wrapper, which only prepends components, changes nothing:
    `m.encoder.layers`, `m.decoder.layers` -> `encoder`, `decoder`.
    """
    unique = list(dict.fromkeys(paths))
    if len(unique) <= 1:
        return dict.fromkeys(unique, "")
    split = {path: path.split(".") for path in unique}
    shared = 0
    while all(len(p) > shared + 1 for p in split.values()) and len({p[shared] for p in split.values()}) == 1:
        shared += 1
    rest = {path: parts[shared:] for path, parts in split.items()}
    for length in range(1, max(len(p) for p in rest.values()) + 1):
        names = {path: "_".join(parts[:length]) for path, parts in rest.items()}
        if len(set(names.values())) == len(names):
            return names
    return {path: "_".join(parts) for path, parts in split.items()}
