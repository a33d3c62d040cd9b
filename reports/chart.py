"""Charts of characters: logarithmic bars with a mark at the noise floor, and profiles of one line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Glyphs:
    """The characters that a report draws with.

    Attributes:
        marks: of a site's verdict.
        partial: bar ends by eighths of a cell, the full cell last.
        levels: of a profile, lowest first.
        tick: where the noise floor is.
        ellipsis: before what is folded.
    """

    marks: dict[str, str]
    partial: str
    levels: str
    tick: str
    ellipsis: str


UNICODE = Glyphs({"pass": "✓", "fail": "✗", "error": "?"}, "▏▎▍▌▋▊▉█", "▁▂▃▄▅▆▇█", "│", "…")
ASCII = Glyphs({"pass": "+", "fail": "X", "error": "?"}, "#", ".:-=+*%@", "|", "...")


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis over whole decades, from `10**low` to `10**high`."""

    low: int
    high: int

    @classmethod
    def over(cls, values: Iterable[float | None]) -> Scale | None:
        """The decades that hold all positive finite `values`; None where there are none."""
        logs = [math.log10(v) for v in values if v is not None and math.isfinite(v) and v > 0]
        if not logs:
            return None
        low = math.floor(min(logs))
        return cls(low, max(math.ceil(max(logs)), low + 1))

    @property
    def ends(self) -> tuple[str, str]:
        """Both ends in writing: `1e-6`, `1e0`."""
        return f"1e{self.low}", f"1e{self.high}"

    def position(self, value: float) -> float:
        """Where `value` lies, from 0 to 1."""
        return min(1.0, max(0.0, (math.log10(value) - self.low) / (self.high - self.low)))


def bar(value: float | None, floor: float | None, scale: Scale, cells: int, glyphs: Glyphs) -> str:
    """A bar of `value` on `scale`, `cells` wide, with a tick where `floor` is."""
    if value is not None and not math.isfinite(value):
        return "NaN or Inf"[:cells]
    drawn = ""
    if value is not None and value > 0:
        eighths = max(1, round(scale.position(value) * cells * len(glyphs.partial)))
        full, rest = divmod(eighths, len(glyphs.partial))
        drawn = glyphs.partial[-1] * full + (glyphs.partial[rest - 1] if rest else "")
    if floor is not None and math.isfinite(floor) and floor > 0:
        at = min(cells - 1, int(scale.position(floor) * cells))
        drawn = drawn.ljust(at + 1)
        drawn = drawn[:at] + glyphs.tick + drawn[at + 1 :]
    return drawn


def profile(values: Sequence[float], glyphs: Glyphs) -> str:
    """One character a value, its height in proportion to the largest; `!` for NaN and Inf."""
    top = max((v for v in values if math.isfinite(v)), default=0.0)
    return "".join(_level(v, top, glyphs.levels) for v in values)


def _level(value: float, top: float, levels: str) -> str:
    if not math.isfinite(value):
        return "!"
    share = max(0.0, value / top) if top > 0 else 0.0
    return levels[min(len(levels) - 1, int(share * len(levels)))]
