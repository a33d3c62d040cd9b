"""Whatever mapping a probe hands over, as tables, lists and pairs that a template can show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from divergence.reports import number, plain


@dataclass(frozen=True)
class Block:
    """A part of a nested mapping.

    Attributes:
        title: the keys that lead to it.
        columns, rows: a table, where it is a list of mappings.
        entries: a list of sentences.
        pairs: single values by name.
    """

    title: str
    columns: tuple[str, ...] = ()
    rows: list[list[str]] = field(default_factory=list)
    entries: list[str] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)


def blocks(content: Mapping[str, Any], title: str = "") -> list[Block]:
    """`content` as blocks: its single values first, then each list and mapping."""
    pairs = [(str(k), text(v)) for k, v in content.items() if not isinstance(v, Mapping | list | tuple)]
    found = [Block(title, pairs=pairs)] if pairs else []
    for name, value in content.items():
        inner = f"{title}.{name}" if title else str(name)
        if isinstance(value, Mapping):
            found += blocks(value, inner)
        elif isinstance(value, list | tuple) and value:
            found.append(_list(inner, value))
    return found


def _list(title: str, values: list[Any] | tuple[Any, ...]) -> Block:
    if not all(isinstance(v, Mapping) for v in values):
        return Block(title, entries=[text(v) for v in values])
    columns = tuple(dict.fromkeys(str(k) for v in values for k in v))
    rows = [[text({str(k): x for k, x in v.items()}.get(c)) for c in columns] for v in values]
    return Block(title, columns=columns, rows=rows)


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
