"""Writes docs/configuration.md from the code: `python docs/render_configuration.py`.

Keys come from the dataclasses of `divergence.config`, their meaning from the docstrings, metrics from
`divergence.result`, options from the commands themselves. A test compares the page with what this renders.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from divergence import config, limits
from divergence.cli import main as commands
from divergence.errors import ConfigurationError
from divergence.precision import PRECISIONS
from divergence.result import METRICS

PAGE = Path(__file__).with_name("configuration.md")

TABLES: Mapping[str, type[Any]] = {
    "": config.Config,
    "sources.NAME": config.SourceConfig,
    "tolerance": config.Tolerance,
}
"""Dataclass by the table of the file that it is read from."""

TYPES: Mapping[str, str] = {
    "str": "text",
    "float": "number",
    "tuple[str, ...]": "list of texts",
    "Mapping[str, str]": "table of texts",
    "Mapping[str, tuple[str, ...]]": "table of lists of texts",
    "Mapping[str, Mapping[str, float]]": "table of tables of numbers",
    "Mapping[str, SourceConfig]": "tables, one a source",
    "Tolerance": "table",
    "Literal['noise-floor', 'absolute']": "text",
}
"""What TOML calls the type of a field."""

CHOICES: Mapping[str, tuple[str, ...]] = {
    "tolerance.policy": limits.POLICIES,
    "sources.NAME.dtype": config.MODEL_DTYPES,
}
"""Keys that take one of several words."""

INTRODUCTION = """\
# Configuration

<!-- Written by docs/render_configuration.py; change the code or that script, and run it. -->

With a `divergence.toml` beside the model, or a `[tool.divergence]` in `pyproject.toml`, the whole command is
`divergence compare --ref pytorch --cand model.onnx`. The file is looked for in the current folder only,
`divergence.toml` first; `--config FILE` names another. In `pyproject.toml` the name of every table starts
with `tool.divergence`. Files named in it are relative to it. An unknown key is an error that names the
nearest known one. The command line counts more than the file.
"""


def render() -> str:
    """The page."""
    return "\n".join((INTRODUCTION, *_file(), *_metrics(), *_options())).rstrip() + "\n"


def _file() -> Iterator[str]:
    example, rules = _docstring(config)
    yield "## An example\n"
    yield f"```toml\n{example}\n```\n"
    yield f"{rules}\n"
    yield "## Keys\n"
    for table, kind in TABLES.items():
        yield f"### {f'`[{table}]`' if table else 'At the top'}\n"
        lead, meanings = _meanings(kind)
        yield f"{lead}\n"
        yield "| key | type | default | |"
        yield "|---|---|---|---|"
        for field in dataclasses.fields(kind):
            if _is_key(table, field.name):
                name = f"{table}.{field.name}" if table else field.name
                cells = (f"`{field.name}`", _type(field, name), _default(field), meanings[field.name])
                yield _row(*cells)
        yield ""


def _metrics() -> Iterator[str]:
    yield "## Metrics that limits are given for\n"
    yield "In `[tolerance.sites.PATTERN]`, and as `--tolerance PATTERN:METRIC=LIMIT`. A pattern is a site"
    yield "with `*` for any text: `layers.*.key`, `output.*`. [metrics.md](metrics.md) has the formulas.\n"
    yield "| metric | | unit | better |"
    yield "|---|---|---|---|"
    for name, info in METRICS.items():
        yield _row(f"`{name}`", info.label, info.unit, info.better)
    yield ""


def _options() -> Iterator[str]:
    yield "## Commands\n"
    precisions = ", ".join(f"`{precision}`" for precision in PRECISIONS)
    yield f"`--precision` takes one of {precisions}, except in `divergence build`.\n"
    for name, command in commands.commands.items():
        context = click.Context(command, info_name=f"divergence {name}")
        yield f"### `divergence {name}`\n"
        arguments = [p.make_metavar(context) for p in command.params if isinstance(p, click.Argument)]
        given = f" Takes {' and '.join(f'`{a}`' for a in arguments)}." if arguments else ""
        yield f"{' '.join(inspect.cleandoc(command.help or '').split())}{given}\n"
        options = [p for p in command.params if isinstance(p, click.Option)]
        if not options:
            continue
        yield "| option | |"
        yield "|---|---|"
        for option in options:
            record = option.get_help_record(context)
            assert record is not None
            required = " Required." if option.required else ""
            yield _row(
                f"`{record[0]}`", record[1].replace("  [required]", "").replace("  [", " [") + required
            )
        yield ""


def _docstring(module: Any) -> tuple[str, str]:
    """The example of the module's docstring, and the rules that follow it."""
    text = inspect.cleandoc(module.__doc__)
    _, example, rules = re.split(r"\n\n(?=    )|\n\n(?=How a site)", text)
    return inspect.cleandoc(example), rules


def _meanings(kind: type[Any]) -> tuple[str, dict[str, str]]:
    """The first paragraph of a dataclass's docstring, and what it says of each attribute."""
    lead, _, attributes = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    items = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", attributes, re.MULTILINE)
    return " ".join(lead.split()), {name: " ".join(text.split()) for name, text in items}


def _is_key(table: str, name: str) -> bool:
    """Whether the configuration takes the key: asked of the reader itself."""
    head = f"[{table}]\n" if table else ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / config.FILE
        file.write_text(f"{head}{name} = {{}}\n", encoding="utf-8")
        try:
            config.load_config(file)
        except ConfigurationError as error:
            return "is not a known key" not in str(error)
    return True


def _type(field: dataclasses.Field[Any], name: str) -> str:
    words = str(field.type).removesuffix(" | None").replace('"', "'")
    if name in CHOICES:
        return "one of " + ", ".join(f"`{choice}`" for choice in CHOICES[name])
    return TYPES[words]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING or field.default is None or field.default == ():
        return ""
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
