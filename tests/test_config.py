from __future__ import annotations

from pathlib import Path

import pytest

from divergence.config import Config, SourceConfig, Tolerance, load_config, parse_tolerance, resolve
from divergence.errors import ConfigurationError
from divergence.sites import Site

FULL = """
inputs = "inputs.safetensors"
exclude = ["output.*"]
mask = "not pad"
[sources.pytorch]
model = "export_kv_cache.py:load"
dtype = "float32"
[sources.engine]
path = "build/engine.plan"
provider = "CPUExecutionProvider"
host = "pycuda"
plugins = ["build/libplugin.so", "libnvinfer_plugin.so"]
inputs = { ids = "input_ids" }
[sources.engine.sites]
"layers.3.key" = "present.3.k"
[tolerance]
policy = "noise-floor"
ratio = 4
[tolerance.sites."layers.*.key"]
cosine = 0.999
mse = 1e-5
"""


def _write(folder: Path, text: str, name: str = "divergence.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def _refused(folder: Path, text: str) -> str:
    path = _write(folder, text)
    with pytest.raises(ConfigurationError) as raised:
        load_config(path)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(f"{path}: ")


def test_everything_in_the_file_is_read_and_files_are_made_absolute(tmp_path: Path) -> None:
    path = _write(tmp_path, FULL)
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "libplugin.so").touch()
    assert load_config(path) == Config(
        inputs=str(tmp_path / "inputs.safetensors"),
        sources={
            "pytorch": SourceConfig(model=f"{tmp_path}/export_kv_cache.py:load", dtype="float32"),
            "engine": SourceConfig(
                path=str(tmp_path / "build/engine.plan"),
                provider="CPUExecutionProvider",
                host="pycuda",
                plugins=(str(tmp_path / "build/libplugin.so"), "libnvinfer_plugin.so"),
                sites={"layers.3.key": "present.3.k"},
                inputs={"ids": "input_ids"},
            ),
        },
        tolerance=Tolerance("noise-floor", 4.0, {"layers.*.key": {"cosine": 0.999, "mse": 1e-5}}),
        exclude=("output.*",),
        mask="not pad",
        path=path,
    )


def test_site_overrides_are_found_by_source(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path, FULL))
    assert config.sites == {"pytorch": {}, "engine": {"layers.3.key": "present.3.k"}}
    assert config.base == tmp_path


def test_without_a_file_all_is_default(tmp_path: Path) -> None:
    config = load_config(start=tmp_path)
    assert config == Config()
    assert config.base == Path.cwd()


def test_the_current_folder_is_searched_and_its_parents_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, 'inputs = "a.npz"')
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config().inputs == str(tmp_path / "a.npz")
    monkeypatch.chdir(inner)
    assert load_config().path is None


def test_relative_config_path_gives_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path, 'inputs = "a.npz"')
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("divergence.toml")).inputs == str(tmp_path / "a.npz")


def test_pyproject_table_counts_and_divergence_toml_comes_before_it(tmp_path: Path) -> None:
    _write(tmp_path, '[project]\nname = "x"\n[tool.divergence]\ninputs = "p.npz"', "pyproject.toml")
    assert load_config(start=tmp_path).inputs == str(tmp_path / "p.npz")
    _write(tmp_path, 'inputs = "d.npz"')
    assert load_config(start=tmp_path).inputs == str(tmp_path / "d.npz")


def test_pyproject_without_the_table_is_no_configuration_but_cannot_be_named(tmp_path: Path) -> None:
    path = _write(tmp_path, '[project]\nname = "x"', "pyproject.toml")
    assert load_config(start=tmp_path) == Config()
    with pytest.raises(ConfigurationError, match=r"has no \[tool\.divergence\]"):
        load_config(path)


def test_unknown_key_in_pyproject_is_named_with_its_full_path(tmp_path: Path) -> None:
    _write(tmp_path, "[tool.divergence.tolerance]\nratios = 4", "pyproject.toml")
    with pytest.raises(
        ConfigurationError,
        match=r"tool\.divergence\.tolerance\.ratios is not a known key; did you mean 'ratio'",
    ):
        load_config(start=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("input = 'a.npz'", "input is not a known key; did you mean 'inputs'?"),
        ("zzz = 1", "zzz is not a known key; known here: inputs, sources, tolerance, exclude, mask"),
        (
            "[sources.a]\npath = 'x'\ndtyp = 'float32'",
            "sources.a.dtyp is not a known key; did you mean 'dtype'?",
        ),
        ("[tolerance]\npolicies = 1", "tolerance.policies is not a known key; did you mean 'policy'?"),
        (
            '[tolerance.sites."layers.*.key"]\ncosin = 0.9',
            "tolerance.sites.\"layers.*.key\".cosin is not a known key; did you mean 'cosine'?",
        ),
        ("inputs = 3", "inputs must be a text that is not empty, not a number ('3')"),
        ("inputs = ' '", "inputs must be a text that is not empty, not a text (' ')"),
        ("mask = 1", "mask must be a text that is not empty, not a number ('1')"),
        ("exclude = 'x'", "exclude must be a list of texts"),
        ("exclude = [1]", "exclude must be a list of texts"),
        ("sources = 1", "sources must be a table, not a number ('1')"),
        ("[sources]\na = 'model.onnx'", "sources.a must be a table, not a text ('model.onnx')"),
        ("[sources.a]\ndtype = 'float32'", "sources.a needs one of model"),
        ("[sources.a]\nmodel = 'a.py:f'\npath = 'x'", "sources.a needs one of model"),
        ("[sources.a]\nmodel = 'a.py'", "sources.a.model is 'a.py'; write it as FILE.py:FUNC or MODULE:FUNC"),
        (
            "[sources.a]\npath = 'x'\ndtype = 'float61'",
            "sources.a.dtype is 'float61', which is not known; did you",
        ),
        (
            "[sources.a]\npath = 'x'\n[sources.a.sites]\n'layers.key' = 'k'",
            "sources.a.sites has a bad key: 'layers",
        ),
        ("[sources.a]\npath = 'x'\ninputs = { ids = 3 }", "sources.a.inputs.ids must be a text"),
        (
            "[tolerance]\npolicy = 'absolut'",
            "tolerance.policy is 'absolut', which is not known; did you mean 'abs",
        ),
        ("[tolerance]\npolicy = 'absolute'", "tolerance.policy is 'absolute' but no limit is given"),
        (
            "[tolerance]\npolicy = 'absolute'\nratio = 2\nsites.'*'.mse = 1",
            "tolerance.ratio has no effect under policy 'absolute'",
        ),
        ("[tolerance]\nratio = 0", "tolerance.ratio: ratio is 0 and must be a finite number above 0"),
        ("[tolerance]\nratio = -1", "tolerance.ratio: ratio is -1 and must be"),
        ("[tolerance]\nratio = nan", "tolerance.ratio: ratio is nan and must be"),
        ("[tolerance]\nratio = inf", "tolerance.ratio: ratio is inf and must be"),
        ("[tolerance]\nratio = true", "tolerance.ratio must be a number, not a boolean ('True')"),
        ("[tolerance]\nratio = '4'", "tolerance.ratio must be a number, not a text ('4')"),
        (
            "[tolerance.sites.'*']\ncosine = 1.5",
            'tolerance.sites."*".cosine: cosine is 1.5 and must be between',
        ),
        ("[tolerance.sites.'*']\nmse = -1e-3", 'tolerance.sites."*".mse: mse is -0.001 and must be'),
        ("[tolerance.sites]\n'*' = 3", 'tolerance.sites."*" must be a table'),
        ("inputs = \n", "invalid TOML: Invalid value (at line 1, column 10)"),
        ("inputs = 'a'\n[tolerance\n", "invalid TOML: "),
    ],
)
def test_mistake_is_named_by_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    assert _refused(tmp_path, text).startswith(message)


def test_a_file_that_is_missing_a_folder_or_no_text_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigurationError, match=r"cannot be read \(.*\); check --config"):
            load_config(path)
    (tmp_path / "divergence.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="is not UTF-8 text"):
        load_config(start=tmp_path)


@pytest.mark.parametrize(
    ("spec", "resolved"),
    [
        ("inputs.npz", "/base/inputs.npz"),
        ("/abs/inputs.npz", "/abs/inputs.npz"),
        ("a/make.py:inputs", "/base/a/make.py:inputs"),
        ("pkg.module:inputs", "pkg.module:inputs"),
    ],
)
def test_files_are_resolved_and_modules_are_not(spec: str, resolved: str) -> None:
    assert resolve(spec, Path("/base")) == resolved


KEY, VALUE = Site(3, "key"), Site(3, "value")


def test_limits_of_the_file_apply_beside_the_noise_floor() -> None:
    tolerance = Tolerance(sites={"layers.*.key": {"cosine": 0.999}})
    assert tolerance.judges_by_floor(KEY)
    assert tolerance.limits(KEY) == {"cosine": 0.999}
    assert tolerance.limits(VALUE) == {}


def test_ratio_of_a_pattern_replaces_the_general_one_there() -> None:
    tolerance = Tolerance(ratio=4, sites={"layers.*.key": {"ratio": 8, "mse": 1}})
    assert (tolerance.ratio_at(KEY), tolerance.ratio_at(VALUE)) == (8, 4)
    assert tolerance.limits(KEY) == {"mse": 1}


def test_of_several_patterns_metrics_add_up_and_the_last_one_wins() -> None:
    tolerance = Tolerance(sites={"*": {"mse": 1, "max_abs": 2}, "layers.3.*": {"mse": 5}})
    assert tolerance.limits(KEY) == {"mse": 5, "max_abs": 2}
    assert tolerance.limits(Site(4, "key")) == {"mse": 1, "max_abs": 2}


def test_absolute_policy_never_judges_by_floor() -> None:
    assert not Tolerance("absolute", sites={"layers.*.key": {"mse": 1}}).judges_by_floor(VALUE)


def test_option_ratio_changes_the_ratio_alone() -> None:
    assert parse_tolerance("ratio=6", Tolerance(sites={"*": {"mse": 1}})) == Tolerance(
        ratio=6, sites={"*": {"mse": 1}}
    )


def test_option_limit_replaces_the_floor_at_its_sites_only() -> None:
    tolerance = parse_tolerance("layers.*.key:cosine=0.999")
    assert tolerance.limits(KEY) == {"cosine": 0.999}
    assert not tolerance.judges_by_floor(KEY)
    assert tolerance.judges_by_floor(VALUE)


def test_option_without_a_pattern_is_for_all_sites() -> None:
    tolerance = parse_tolerance("mse=1e-5")
    assert tolerance.limits(VALUE) == {"mse": 1e-5}
    assert not tolerance.judges_by_floor(VALUE)


def test_option_ratio_of_a_pattern_keeps_the_floor() -> None:
    tolerance = parse_tolerance("layers.*.key:ratio=8")
    assert (tolerance.ratio_at(KEY), tolerance.ratio_at(VALUE)) == (8, 4)
    assert tolerance.judges_by_floor(KEY)


def test_options_add_up_and_come_after_the_file() -> None:
    tolerance = Tolerance(sites={"*": {"mse": 1}, "layers.*.key": {"mse": 2}})
    for option in ("*:mse=3", "mse=4", "max_abs=5"):
        tolerance = parse_tolerance(option, tolerance)
    assert tolerance.limits(KEY) == {"mse": 4, "max_abs": 5}
    assert tolerance.absolute == ("*",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4", "write it as ratio=4"),
        ("=4", "write it as ratio=4"),
        (":mse=4", "write it as ratio=4"),
        ("layers.*.key:=4", "write it as ratio=4"),
        ("mse=", "'' is not a number"),
        ("mse=small", "'small' is not a number"),
        ("cosin=0.9", "'cosin' is not a metric; did you mean 'cosine'?"),
        ("cosine=2", "cosine is 2 and must be between -1 and 1"),
        ("ratio=0", "ratio is 0 and must be"),
        ("mse=nan", "mse is nan and must be"),
        ("*:ratio=-1", "ratio is -1 and must be"),
    ],
)
def test_bad_option_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        parse_tolerance(text)
    assert str(raised.value).startswith(f"--tolerance {text}: {message}")


def test_axes_of_a_sources_tensors_are_read(tmp_path: Path) -> None:
    file = tmp_path / "divergence.toml"
    file.write_text(
        '[sources.a]\npath = "a.onnx"\n[sources.a.axes]\n"output.keys" = ["layer", "batch", "head"]\n'
    )
    assert load_config(file).sources["a"].axes == {"output.keys": ("layer", "batch", "head")}
