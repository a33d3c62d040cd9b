"""The page: one file that needs nothing else, for a pull request or a colleague."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from divergence import __version__
from divergence.reports import plain
from divergence.reports.html.view import page_data, view
from divergence.result import Comparison

if TYPE_CHECKING:
    from divergence.chain_result import Chain

_HERE = Path(__file__).parent


def render_html(comparison: Comparison) -> str:
    """A self-contained page of HTML.

    It requests nothing, its policy allows nothing but the style and the script within, by their
    hashes, and all that comes from the model is escaped.
    """
    script = _file("script.js")
    return _filled(
        "page.html.jinja",
        script,
        **view(comparison),
        script=Markup(script),  # noqa: S704 (a file of this package)
        data=Markup(page_data(comparison)),  # noqa: S704 (JSON in which no tag can begin or end)
    )


def render_index(
    entries: Sequence[Mapping[str, Any]], verdict: str, said: str, tally: Mapping[str, int], kind: str
) -> str:
    """The page of all comparisons of a test session, or of all pairs, as self-contained as that of one.

    Args:
        entries: as of `divergence.reports.index`, in the order to show.
        verdict: of all.
        said: the verdict in a sentence.
        tally: comparisons by verdict.
        kind: `session` or `pairs`.
    """
    brand, noun = _INDEXES[kind]
    return _filled(
        "index.html.jinja",
        entries=entries,
        verdict=verdict,
        said=said,
        tally=tally,
        brand=brand,
        noun=noun,
        grid=_grid(entries) if kind == "pairs" else None,
        version=__version__,
    )


_INDEXES = {
    "session": ("all comparisons of a test session", "test"),
    "pairs": ("all candidates on all samples", "pair"),
}
"""What an index of a kind is over, and what it calls a comparison."""


def _grid(entries: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Pairs as a table of candidates by samples."""
    by_place = {(e["name"], e["sample"]): e for e in sorted(entries, key=lambda e: e["number"])}
    samples = list(dict.fromkeys(sample for _, sample in by_place))
    names = dict.fromkeys(name for name, _ in by_place)
    return {"samples": samples, "rows": [(name, [by_place[name, s] for s in samples]) for name in names]}


def render_chain_html(chain: Chain) -> str:
    """The page of a chain, as self-contained as that of one candidate; it links to theirs, which
    `divergence.reports.write_all` puts beside it."""
    from divergence.reports.html.chain import chain_view

    return _filled("chain.html.jinja", **chain_view(chain), version=__version__)


def _filled(template: str, allowed_script: str = "", **variables: Any) -> str:
    """The page that `template` makes of `variables`, whose policy allows the house style and one script."""
    style = _file("style.css")
    page = _template(template).render(
        **variables,
        style=Markup(style),  # noqa: S704 (a file of this package)
        policy_header=_security_policy(style, allowed_script),
    )
    # Half of a surrogate pair, which JSON may hold, is no character that a file could.
    return page.encode("utf-8", "backslashreplace").decode()


@cache
def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        finalize=_visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _visible(value: object) -> object:
    """Text from the model without control characters, nor such as turn the direction of reading."""
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _security_policy(style: str, script: str = "") -> str:
    """Nothing from anywhere; heat maps are pictures within the page (data:)."""
    scripts = f"script-src {_hash(script)}; " if script else ""
    return (
        f"default-src 'none'; style-src {_hash(style)}; {scripts}img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
