"""Whatever mapping a probe hands over, as tables, lists and pairs that a template can show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from divergence.reports import number, plain

# A list of more is folded away; of a list of more than this the rest is left to report.json.
_SHOWN, _MOST = 40, 300
_WIDEST = 120
# A row that has this key says all of itself in it.
_SENTENCE = "sentence"


@dataclass(frozen=True)
class Block:
    """A part of a nested mapping.

    Attributes:
        title: the keys that lead to it.
        columns, rows: a table, where it is a list of mappings.
        entries: a list of sentences.
        left_out: how many rows or entries of a very long list are not here.
        pairs: single values by name.
    """

    title: str
    columns: tuple[str, ...] = ()
    rows: list[list[str]] = field(default_factory=list)
    entries: list[str] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    left_out: int = 0

    @property
    def folded(self) -> bool:
        """Whether it is too long to be shown unasked."""
        return len(self.rows) + len(self.entries) > _SHOWN


def blocks(content: Mapping[str, Any], title: str = "") -> list[Block]:
    """`content` as blocks: its single values first, then each list and mapping; what is empty is left out."""
    single = {k: text(v) for k, v in content.items() if not isinstance(v, Mapping | list | tuple)}
    pairs = [(_spoken(k), value) for k, value in single.items() if value]
    found = [Block(title, pairs=pairs)] if pairs else []
    for name, value in content.items():
        inner = f"{title}, {_spoken(name)}" if title else _spoken(name)
        if isinstance(value, Mapping):
            found += blocks(value, inner)
        elif isinstance(value, list | tuple) and value:
            found.append(_list(inner, value))
    return found


def _list(title: str, values: Sequence[Any]) -> Block:
    left_out = max(0, len(values) - _MOST)
    values = values[:_MOST]
    if all(isinstance(v, Mapping) and _SENTENCE in v for v in values):
        return Block(title, entries=[text(v[_SENTENCE]) for v in values], left_out=left_out)
    if not all(isinstance(v, Mapping) for v in values):
        return Block(title, entries=[text(v) for v in values], left_out=left_out)
    named = [{str(k): text(x) for k, x in v.items()} for v in values]
    columns = tuple(c for c in dict.fromkeys(k for v in named for k in v) if any(v.get(c) for v in named))
    rows = [[_cut(v.get(c, "")) for c in columns] for v in named]
    return Block(title, columns=tuple(map(_spoken, columns)), rows=rows, left_out=left_out)


def _spoken(key: Any) -> str:
    return plain(key).replace("_", " ")


def _cut(value: str) -> str:
    return value if len(value) <= _WIDEST else f"{value[: _WIDEST - 1]}…"


def flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """All values of a nested mapping: `("reference.versions.torch", "2.9.0")`."""
    found: list[tuple[str, str]] = []
    for name, value in content.items():
        path = f"{prefix}{name}"
        found += flat(value, f"{path}.") if isinstance(value, Mapping) else [(path, text(value))]
    return found


def text(value: Any) -> str:
    """A value on one line; None is nothing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value, 6)
    if isinstance(value, Mapping):
        return ", ".join(f"{plain(k)} {text(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(text(v) for v in value)
    return plain(value)
