"""A page of plain lines: what the terminal report is laid out on."""

from __future__ import annotations

import io
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from divergence.reports import plain
from divergence.reports.chart import ASCII, UNICODE

MIN_WIDTH = 40
_INDENT = 2


class Page:
    """Collects lines, none wider than `width` cells, and gives them as one string.

    All text is taken literally: no markup, and nothing that a terminal would obey.

    Args:
        width: in character cells; at least `MIN_WIDTH` are used.
        color: write ANSI colours.
        ascii_only: write no character beyond ASCII.
    """

    def __init__(self, *, width: int, color: bool, ascii_only: bool) -> None:
        self.width = max(width, MIN_WIDTH)
        self.glyphs = ASCII if ascii_only else UNICODE
        self._ascii = ascii_only
        self._lines: list[Text] = []
        # An empty environment: what COLUMNS, TERM or NO_COLOR say is the caller's to weigh.
        self._console = Console(
            file=io.StringIO(),
            width=self.width,
            force_terminal=color,
            color_system="standard" if color else None,
            legacy_windows=False,
            _environ={},
        )

    def plain(self, text: object) -> str:
        """`text` as it may stand on this page."""
        return plain(text, ascii_only=self._ascii)

    def text(self, text: object, style: str = "", *, indent: int = 0, lead: Text | None = None) -> None:
        """Writes `text`, wrapped; continuation lines stand `indent` cells in, the first behind `lead`."""
        body = Text(self.plain(text), style)
        for i, line in enumerate(body.wrap(self._console, self.width - indent, overflow="fold")):
            head = lead if i == 0 and lead is not None else Text(" " * indent)
            self.styled(head + line)

    def styled(self, line: Text) -> None:
        """Writes a line that is known to fit."""
        line.rstrip()
        self._lines.append(line)

    def labelled(self, label: str, text: object, *, column: int = 0, style: str = "") -> None:
        """Writes `text` indented behind a bold `label`; texts start `column` cells from the left."""
        name = self.plain(label)
        lead = Text(" " * _INDENT) + Text(name, "bold")
        start = max(column, lead.cell_len + _INDENT)
        if start > self.width // 2:
            self.text(label, "bold", indent=_INDENT, lead=Text(" " * _INDENT))
            start = 2 * _INDENT
            self.text(text, style, indent=start)
            return
        lead.pad_right(start - lead.cell_len)
        self.text(text, style, indent=start, lead=lead)

    def pairs(self, pairs: Iterable[tuple[str, object]]) -> None:
        """Writes labels with their texts in one column."""
        shown = [(label, text) for label, text in pairs if text]
        widest = max((Text(self.plain(label)).cell_len for label, _ in shown), default=0)
        for label, text in shown:
            self.labelled(label, text, column=min(widest + 2 * _INDENT, self.width // 2))

    def section(self, title: str, remark: str = "") -> None:
        """Starts a section, an empty line before it; `remark` follows its title on the same line."""
        self._lines.append(Text(""))
        if not remark:
            self.text(title, "bold cyan")
            return
        lead = Text(title, "bold cyan") + Text(": ")
        self.text(remark, "dim", indent=lead.cell_len, lead=lead)

    def __str__(self) -> str:
        with self._console.capture() as capture:
            for line in self._lines:
                self._console.print(line, soft_wrap=True, highlight=False)
        return capture.get().rstrip("\n")
