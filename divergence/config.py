"""Configuration: `divergence.toml`, or `[tool.divergence]` in pyproject.toml.

    inputs = "inputs.safetensors"             # or .npz, "FILE.py:FUNC", "pkg.module:function"
    exclude = ["output.*"]                    # sites that are not compared
    mask = "not pad"                          # the input that tells padding, where its name does not
    [sources.pytorch]
    model = "export_kv_cache.py:load"         # a callable that returns the module; or: path = "engine.plan"
    dtype = "float32"
    [sources.engine]
    path = "engine.plan"
    inputs = { ids = "input_ids" }            # the source's input name = the name in our inputs
    sites = { "layers.3.key" = "present.3.k" }  # site = the source's own name of that value
    [tolerance]
    policy = "noise-floor"                    # error/floor <= ratio; or "absolute"
    ratio = 4
    [tolerance.sites."layers.*.key"]
    cosine = 0.999

How a site is judged:

- Policy `noise-floor`: its error over its noise floor must not exceed `ratio`. Limits under
  `[tolerance.sites.PATTERN]` apply in addition, so a limit can only make the verdict stricter;
  `ratio` given there replaces the general one for the sites that match.
- Policy `absolute`: only the limits under `[tolerance.sites]` count, no floor is needed. A site that
  no pattern matches is then judged by its non-finite values alone.
- `--tolerance PATTERN:METRIC=LIMIT` on the command line says that the user wants to judge these sites
  by that limit: for them, and only for them, it replaces the noise floor.
- Where several patterns match a site, limits of different metrics add up, and of one metric the
  pattern written last wins.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from divergence.errors import ConfigurationError, nearest, one_line
from divergence.limits import POLICIES, check_limit, check_tolerance, limits_at
from divergence.result import METRICS
from divergence.sites import Site, matches

FILE = "divergence.toml"
PYPROJECT = "pyproject.toml"
MODEL_DTYPES = ("float64", "float32", "float16", "bfloat16")
DEFAULT_RATIO = 4.0


@dataclass(frozen=True)
class Tolerance:
    """What a site may be off by.

    Attributes:
        policy: `noise-floor` or `absolute`.
        ratio: largest error over noise floor.
        sites: limits by site pattern and metric (`divergence.result.METRICS`), each in the unit of
            its metric, a lower bound where higher is better.
        absolute: patterns whose sites are judged by their limits alone, whatever the policy.

    Raises:
        ConfigurationError: there is no such policy or metric, a limit makes no sense, or the policy is
            `absolute` and there is no limit.
    """

    policy: Literal["noise-floor", "absolute"] = "noise-floor"
    ratio: float = DEFAULT_RATIO
    sites: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    absolute: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_tolerance(self.policy, self.ratio, self.sites)

    def judges_by_floor(self, site: Site) -> bool:
        """Whether the noise floor decides on `site`."""
        return self.policy == "noise-floor" and not any(matches(site, p) for p in self.absolute)

    def ratio_at(self, site: Site) -> float:
        """Largest error over noise floor at `site`."""
        return limits_at(self.sites, site).get("ratio", self.ratio)

    def limits(self, site: Site) -> dict[str, float]:
        """Absolute limits at `site` by metric."""
        return {name: limit for name, limit in limits_at(self.sites, site).items() if name != "ratio"}


@dataclass(frozen=True)
class SourceConfig:
    """A named source. Exactly one of `model` and `path` is given.

    Attributes:
        model: `FILE.py:FUNC` or `MODULE:FUNC`, a callable that returns the module; a file is made absolute.
        path: an `.onnx` file, an engine or a capture; made absolute.
        dtype: dtype to convert the model's parameters to; without it they are left as they are.
        provider: execution provider of onnxruntime; `CPUExecutionProvider` without it.
        host: how an engine is run: `torch`, `pycuda`, `both` or `FILE.py:CLASS`; `torch` without it.
        plugins: libraries to load before an engine; a file beside the configuration is made absolute.
        sites: name of the source's own value by site, where finding it fails or errs.
        inputs: name in our inputs by the source's input name, where they differ.
        axes: names of the axes of a tensor by site, where sizes alone leave them open.
    """

    model: str | None = None
    path: str | None = None
    dtype: str | None = None
    provider: str | None = None
    host: str | None = None
    plugins: tuple[str, ...] = ()
    sites: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Config:
    """The configuration; all defaults where there is no file.

    Attributes:
        inputs: where the inputs come from: a `.safetensors` or `.npz` file, `FILE.py:FUNC` or
            `MODULE:FUNC`; a file is made absolute.
        sources: sources by name.
        tolerance: how sites are judged.
        exclude: patterns of sites that are not compared.
        mask: the input `[batch, token]` that is 0 at padding, which is not compared, or `not NAME` for one
            that is 0 elsewhere; without it `attention_mask`, `decoder_attention_mask` and torch's own
            `key_padding_mask`, `src_key_padding_mask` and `tgt_key_padding_mask` are recognised.
        path: the file it was read from.
    """

    inputs: str | None = None
    sources: Mapping[str, SourceConfig] = field(default_factory=dict)
    tolerance: Tolerance = field(default_factory=Tolerance)
    exclude: tuple[str, ...] = ()
    mask: str | None = None
    path: Path | None = None

    @property
    def sites(self) -> Mapping[str, Mapping[str, str]]:
        """Overrides of where a site is found, by source name and site."""
        return {name: source.sites for name, source in self.sources.items()}

    @property
    def base(self) -> Path:
        """The folder that modules are imported from and relative paths start at."""
        return self.path.parent if self.path else Path.cwd()


def load_config(path: str | Path | None = None, start: str | Path | None = None) -> Config:
    """Reads the configuration.

    Args:
        path: the file (`--config`). Without it, `divergence.toml` in `start` counts, else
            `[tool.divergence]` of its `pyproject.toml`; parent folders are not searched, so that
            what a command does never depends on a file out of sight.
        start: folder to look in; the current one by default.

    Raises:
        ConfigurationError: no such file, invalid TOML, an unknown key, or a bad value.
    """
    if path is not None:
        path = Path(path)
        content = _table_of(path, _read(path))
        if content is None:
            raise ConfigurationError(f"{path}: has no [tool.divergence]; add it, or name a {FILE}")
        return _config(path.absolute(), content)
    for name in (FILE, PYPROJECT):
        found = Path(start or Path.cwd()).absolute() / name
        if found.is_file():
            content = _table_of(found, _read(found))
            if content is not None:
                return _config(found, content)
    return Config()


def parse_tolerance(text: str, base: Tolerance | None = None) -> Tolerance:
    """`base` with one `--tolerance` option applied; apply repeated options one after the other.

    Args:
        text: `ratio=4`; `PATTERN:METRIC=LIMIT` (`layers.*.key:cosine=0.999`); `METRIC=LIMIT` for all
            sites (`mse=1e-5`). A limit replaces the noise floor at the sites it is given for;
            `PATTERN:ratio=8` keeps the floor and changes its ratio there.
        base: what to add to; the default tolerance if None.

    Raises:
        ConfigurationError: `text` has another form, names no metric, or its limit makes no sense.
    """
    base = base or Tolerance()
    target, separator, number = text.rpartition("=")
    pattern, _, metric = target.rpartition(":")
    pattern, metric, number = pattern.strip(), metric.strip(), number.strip()
    where = f"--tolerance {text}"
    if not separator or not metric or (":" in target and not pattern):
        raise ConfigurationError(f"{where}: write it as ratio=4, mse=1e-5 or layers.*.key:cosine=0.999")
    try:
        value = float(number)
    except ValueError as error:
        raise ConfigurationError(f"{where}: '{number}' is not a number") from error
    limit = check_limit(where, metric, value)
    if metric == "ratio" and not pattern:
        return replace(base, ratio=limit)
    pattern = pattern or "*"
    sites = {name: limits for name, limits in base.sites.items() if name != pattern}
    sites[pattern] = {**base.sites.get(pattern, {}), metric: limit}
    absolute = base.absolute if metric == "ratio" else tuple(dict.fromkeys((*base.absolute, pattern)))
    return replace(base, sites=sites, absolute=absolute)


def resolve(spec: str, base: Path) -> str:
    """`spec` with its file made absolute against `base`; a URL and `MODULE:FUNC` stay as they are."""
    file, separator, function = spec.rpartition(":")
    if "://" in spec:
        return spec
    if not separator:
        return str(base / spec)
    return f"{base / file}:{function}" if file.endswith(".py") else spec


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise ConfigurationError(f"{path}: cannot be read ({reason}); check --config") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: is not UTF-8 text, as TOML has to be") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path}: invalid TOML: {error}") from error


def _table_of(path: Path, content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if path.name != PYPROJECT:
        return content
    tool = content.get("tool", {})
    found = tool.get("divergence") if isinstance(tool, dict) else None
    return found if isinstance(found, dict) else None


class _Table:
    """A table of the file, whose keys are read by type and whose errors name the full key."""

    def __init__(self, file: Path, name: str, content: Any, known: Iterable[str] | None = None) -> None:
        self.file, self.name = file, name
        if not isinstance(content, dict):
            raise self.error(name, f"must be a table, not {_kind(content)}")
        self.content: Mapping[str, Any] = content
        allowed = None if known is None else tuple(known)
        for key in content:
            if allowed is not None and key not in allowed:
                hint = nearest(key, allowed) or f"; known here: {', '.join(allowed)}"
                raise self.error(self.dotted(key), f"is not a known key{hint}")

    def dotted(self, key: str) -> str:
        bare = key.replace("-", "").replace("_", "").isalnum()
        part = key if bare else f'"{key}"'
        return f"{self.name}.{part}" if self.name else part

    def error(self, dotted: str, message: str) -> ConfigurationError:
        return ConfigurationError(f"{self.file}: {dotted or 'the file'} {message}")

    def table(self, key: str, known: Iterable[str] | None = None) -> _Table:
        return _Table(self.file, self.dotted(key), self.content.get(key, {}), known)

    def string(self, key: str) -> str | None:
        value = self.content.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not value.strip():
            raise self.error(self.dotted(key), f"must be a text that is not empty, not {_kind(value)}")
        return value

    def choice(self, key: str, allowed: tuple[str, ...]) -> str | None:
        value = self.string(key)
        if value is not None and value not in allowed:
            hint = nearest(value, allowed) or f"; use one of {', '.join(allowed)}"
            raise self.error(self.dotted(key), f"is '{value}', which is not known{hint}")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        value = self.content.get(key, [])
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            raise self.error(self.dotted(key), "must be a list of texts")
        return tuple(value)

    def names(self, key: str) -> dict[str, str]:
        table = self.table(key)
        found = {name: table.string(name) for name in table.content}
        return {name: value for name, value in found.items() if value is not None}

    def number(self, key: str) -> float:
        value = self.content[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(self.dotted(key), f"must be a number, not {_kind(value)}")
        return float(value)


def _kind(value: Any) -> str:
    kinds = {
        str: "a text",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "a table",
    }
    return f"{kinds.get(type(value), type(value).__name__)} ({str(value)[:40]!r})"


def _config(path: Path, content: Mapping[str, Any]) -> Config:
    prefix = "tool.divergence" if path.name == PYPROJECT else ""
    root = _Table(path, prefix, content, ("inputs", "sources", "tolerance", "exclude", "mask"))
    inputs = root.string("inputs")
    sources = root.table("sources")
    return Config(
        inputs=None if inputs is None else resolve(inputs, path.parent),
        sources={
            name: _source(sources.table(name, SourceConfig.__dataclass_fields__)) for name in sources.content
        },
        tolerance=_tolerance(root.table("tolerance", ("policy", "ratio", "sites"))),
        exclude=root.strings("exclude"),
        mask=root.string("mask"),
        path=path,
    )


def _source(table: _Table) -> SourceConfig:
    model, path = table.string("model"), table.string("path")
    if (model is None) == (path is None):
        given = "both" if model else "neither"
        raise table.error(
            table.name, f"needs one of model (a callable) and path (a file) and has {given} of them"
        )
    if model is not None and ":" not in model:
        raise table.error(table.dotted("model"), f"is '{model}'; write it as FILE.py:FUNC or MODULE:FUNC")
    sites = table.names("sites")
    for site in sites:
        try:
            Site.parse(site)
        except ConfigurationError as error:
            raise table.error(table.dotted("sites"), f"has a bad key: {error}") from error
    base = table.file.parent
    axes = table.table("axes")
    return SourceConfig(
        model=None if model is None else resolve(model, base),
        path=None if path is None else path if "://" in path else str(base / path),
        dtype=table.choice("dtype", MODEL_DTYPES),
        provider=table.string("provider"),
        host=table.string("host"),
        plugins=tuple(str(base / p) if (base / p).is_file() else p for p in table.strings("plugins")),
        sites=sites,
        inputs=table.names("inputs"),
        axes={site: axes.strings(site) for site in axes.content},
    )


def _tolerance(table: _Table) -> Tolerance:
    policy = table.choice("policy", POLICIES) or "noise-floor"
    ratio = DEFAULT_RATIO
    if "ratio" in table.content:
        ratio = check_limit(f"{table.file}: {table.dotted('ratio')}", "ratio", table.number("ratio"))
    patterns = table.table("sites")
    sites: dict[str, dict[str, float]] = {}
    for pattern in patterns.content:
        limits = patterns.table(pattern, METRICS)
        sites[pattern] = {
            metric: check_limit(f"{table.file}: {limits.dotted(metric)}", metric, limits.number(metric))
            for metric in limits.content
        }
    if policy == "absolute":
        if not sites:
            raise table.error(
                table.dotted("policy"),
                "is 'absolute' but no limit is given; add one, such as "
                '[tolerance.sites."*"] with mse = 1e-5',
            )
        if "ratio" in table.content or any("ratio" in limits for limits in sites.values()):
            raise table.error(
                table.dotted("ratio"), "has no effect under policy 'absolute'; remove one of them"
            )
    return Tolerance("absolute" if policy == "absolute" else "noise-floor", ratio, sites)
