"""Makes Matplotlib's SVG part of a page: no styles (the page's security policy forbids them), colours
as the page's variables, and a place for the pointer over every layer."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET

from divergence.reports import plain
from divergence.reports.drawing import Plot
from divergence.reports.drawing.style import PALETTE

_NOTHING = dict.fromkeys(("Date", "Creator", "Format", "Type"))
_VARIABLES = {color: f"var(--{name})" for name, color in PALETTE.items()}
_NUMBER = re.compile(r"-?\d+\.\d+")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
# What the style sheet of the page says for all plots.
_SAID_ONCE = {"font-family", "stroke-linejoin"}


def saved(plot: Plot) -> str:
    """The plot as Matplotlib writes it, without a date."""
    written = io.BytesIO()
    plot.figure.savefig(written, format="svg", metadata=_NOTHING)
    return written.getvalue().decode()


def embedded(plot: Plot) -> str:
    """The plot as an `svg` element of a page; all text in it is escaped."""
    root = ET.fromstring(saved(plot))  # noqa: S314 (written by Matplotlib, a line above)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}style", "}metadata")):
                parent.remove(child)
    kept, prefix = _referenced(root), _identifier(plot.name)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        _rewrite(element, prefix, kept)
    width, height = root.get("viewBox", "0 0 1 1").split()[2:]
    root.attrib = {
        "viewBox": f"0 0 {width} {height}",
        "class": "plot",
        "role": "img",
        "aria-label": plain(plot.title),
        "data-tensor": plain(plot.tensor),
        "data-kind": plot.kind,
    }
    if plot.columns:
        root.attrib |= {"tabindex": "0", "data-bins": str(plot.bins)}
        _add_columns(root, plot)
    for element in root.iter():
        element.tail = None
        if element.tag != "text":
            element.text = None
    return ET.tostring(root, encoding="unicode")


def _referenced(root: ET.Element) -> set[str]:
    found = set()
    for element in root.iter():
        for name, value in element.attrib.items():
            found |= set(_REFERENCE.findall(value))
            if name.endswith("href") and value.startswith("#"):
                found.add(value[1:])
    return found


def _rewrite(element: ET.Element, prefix: str, kept: set[str]) -> None:
    written: dict[str, str] = {}
    for name, value in element.attrib.items():
        name = name.rpartition("}")[2]  # noqa: PLW2901
        if name == "style":
            written |= _attributes(value)
        elif name == "id":
            if value in kept:
                written["id"] = f"{prefix}-{value}"
        elif name == "href":
            written["href"] = f"#{prefix}-{value[1:]}" if value.startswith("#") else value.replace("\n", "")
        elif name == "d":
            written["d"] = " ".join(_NUMBER.sub(_rounded, value).split())
        elif not (name == "transform" and value.startswith("rotate(-0 ")):
            written[name] = _REFERENCE.sub(f"url(#{prefix}-\\g<1>)", _NUMBER.sub(_rounded, value))
    element.attrib = {name: _VARIABLES.get(value, value) for name, value in written.items()}


def _identifier(name: str) -> str:
    """Another for each name, of characters that an `id` and a reference to it can hold."""
    return re.sub(r"[^A-Za-z0-9.-]", lambda found: f"_{ord(found[0]):x}_", name)


def _attributes(style: str) -> dict[str, str]:
    pairs = (part.split(":", 1) for part in style.split(";") if ":" in part)
    return {name.strip(): value.strip() for name, value in pairs if name.strip() not in _SAID_ONCE}


def _rounded(match: re.Match[str]) -> str:
    return f"{float(match[0]):.2f}".rstrip("0").rstrip(".")


def _add_columns(root: ET.Element, plot: Plot) -> None:
    """A transparent rectangle over every layer call: what is hovered, selected and marked."""
    left, top, width, height = plot.area
    step = width / plot.columns
    for i in range(plot.columns):
        ET.SubElement(
            root,
            "rect",
            {
                "class": "hit",
                "data-r": str(i),
                "x": f"{left + i * step:.2f}",
                "y": f"{top:.1f}",
                "width": f"{step:.2f}",
                "height": f"{height:.1f}",
            },
        )
