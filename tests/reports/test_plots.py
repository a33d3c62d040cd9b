from __future__ import annotations

import math
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from divergence.reports.axes import axis_size
from divergence.reports.drawing import Plot, house_style, plots
from divergence.reports.plots import write_plots
from divergence.result import Comparison
from tests.reports import cases


def drawn(comparison: Comparison, name: str) -> Plot:
    with house_style():
        return next(plot for plot in plots(comparison) if plot.name == name)


def line(plot: Plot, label: str) -> list[float]:
    (found,) = (item for item in plot.figure.axes[0].get_lines() if item.get_label() == label)
    return [float(y) for y in np.asarray(found.get_ydata(), dtype=float)]


@pytest.mark.parametrize("name", cases.CASES)
def test_every_comparison_can_be_drawn(name: str, tmp_path: Path) -> None:
    files = write_plots(cases.CASES[name], tmp_path)
    assert {f.suffix for f in files} == ({".png", ".svg"} if cases.CASES[name].sites else set())
    for file in files:
        assert file.parent == tmp_path
        content = file.read_bytes()
        assert content.startswith(b"\x89PNG") if file.suffix == ".png" else ET.fromstring(content) is not None  # noqa: S314


def test_the_files_are_those_of_the_page(tmp_path: Path) -> None:
    names = {file.stem for file in write_plots(cases.fails(4), tmp_path)}
    assert names == {
        *(f"accumulation-{t}" for t in cases.ALL),
        *(f"range-{t}" for t in cases.ALL),
        *(f"heads-{t}" for t in cases.KEY_VALUE),
        *(f"tokens-{t}" for t in cases.ALL),
        *(f"spread-{axis}" for axis in ("token", "head", "channel")),
    }


def test_plots_of_an_earlier_report_do_not_stay(tmp_path: Path) -> None:
    write_plots(cases.fails(4), tmp_path)
    (tmp_path / "mine.png").write_bytes(b"not ours")
    kept = {f.name for f in write_plots(cases.passes(4), tmp_path)}
    assert {f.name for f in tmp_path.iterdir()} == kept | {"mine.png"}


def test_the_same_comparison_gives_the_same_files(tmp_path: Path) -> None:
    first, second = (write_plots(cases.fails(3), tmp_path / name) for name in ("a", "b"))
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in second]


def test_a_name_cannot_leave_the_folder(tmp_path: Path) -> None:
    odd = cases.comparison(cases.site(0, "key"))
    sites = tuple(type(s)(**{**vars(s), "tensor": "../../x/$\\frac$"}) for s in odd.sites)
    files = write_plots(type(odd)(**{**vars(odd), "sites": sites}), tmp_path / "plots")
    assert {f.parent for f in files} == {tmp_path / "plots"}
    assert not (tmp_path / "x").exists()


def test_text_stays_text_in_svg(tmp_path: Path) -> None:
    write_plots(cases.fails(4), tmp_path)
    text = (tmp_path / "accumulation-key.svg").read_text(encoding="utf-8")
    assert "Relative error of key by layer" in text
    assert "noise floor" in text


def test_the_accumulation_plot_shows_the_figures() -> None:
    case = cases.fails(5)
    plot = drawn(case, "accumulation-key")
    sites = [s for s in case.sites if s.tensor == "key"]
    assert line(plot, "cumulative") == [s.rel_l2 for s in sites]
    assert line(plot, "introduced") == [s.introduced for s in sites]
    assert line(plot, "limit") == [4 * cases.FLOOR] * 5
    assert line(plot, "fails") == [s.introduced for s in sites]
    assert plot.figure.axes[0].get_yscale() == "log"


def test_no_line_leads_from_one_stack_into_the_next() -> None:
    values = line(drawn(cases.several_stacks(), "accumulation-key"), "cumulative")
    assert [i for i, v in enumerate(values) if math.isnan(v)] == [27, 46, 65]


def test_all_tensors_share_their_scale() -> None:
    with house_style():
        limits = {
            plot.figure.axes[0].get_ylim() for plot in plots(cases.fails()) if plot.kind == "accumulation"
        }
    assert len(limits) == 1


def test_an_error_of_zero_is_drawn_at_the_bottom() -> None:
    case = cases.comparison(cases.site(0, "key"), cases.site(1, "key", 0.0))
    assert line(drawn(case, "accumulation-key"), "cumulative") == [1.1 * cases.FLOOR, 1e-4]


def test_a_layer_of_nan_is_marked_and_has_no_point() -> None:
    plot = drawn(cases.nonfinite(), "accumulation-hidden")
    assert [math.isnan(v) for v in line(plot, "cumulative")] == [False] * 5 + [True] * 7
    crosses = next(item for item in plot.figure.axes[0].get_lines() if item.get_marker() == "x")
    assert list(np.asarray(crosses.get_xdata())) == list(range(5, 12))


def test_a_heat_map_has_the_profile_of_every_layer() -> None:
    case = cases.passes(6)
    plot = drawn(case, "tokens-key")
    (image,) = plot.figure.axes[0].get_images()
    shown = np.asarray(image.get_array())
    assert shown.shape == (64, 6)
    assert shown[:, 2].tolist() == pytest.approx(case.site("layers.2.key").profile.token)


def test_nan_has_a_colour_of_its_own_in_a_heat_map() -> None:
    (image,) = drawn(cases.nonfinite(), "tokens-key").figure.axes[0].get_images()
    colors = image.to_rgba(np.asarray(image.get_array()))
    grey = image.get_cmap().get_over()
    assert np.allclose(colors[:, 8], grey)
    assert not np.isclose(colors[:, 3], grey).all(axis=-1).any()


def test_a_range_with_a_massive_activation_keeps_the_others_visible() -> None:
    wide = {"ref_min": -2e4, "ref_max": 2e4, "cand_min": -2e4, "cand_max": 2e4}
    sites = [cases.site(n, "hidden", **(wide if n > 2 else {})) for n in range(12)]
    axes = drawn(cases.comparison(*sites), "range-hidden").figure.axes[0]
    assert axes.get_yscale() == "symlog"
    low, high = axes.transAxes.inverted().transform(axes.transData.transform([(0, -35), (0, 40)]))[:, 1]
    assert high - low > 0.1
    assert drawn(cases.passes(4), "range-hidden").figure.axes[0].get_yscale() == "linear"


def test_the_spread_is_told_by_position() -> None:
    (filled, *_) = drawn(cases.fails(2), "spread-token").figure.axes[0].get_lines()
    x = np.asarray(filled.get_xdata(), dtype=float)
    assert x[0] == pytest.approx(cases.TOKENS / 128)
    assert x[-1] == pytest.approx(cases.TOKENS * (1 - 1 / 128))


def test_sizes_are_taken_from_the_shape_only_where_they_can_be() -> None:
    site = cases.site(0, "key")
    assert [axis_size(site, a) for a in ("token", "head", "channel")] == [970, 4, 64]
    turned = type(site)(**{**vars(site), "shape": (1, 970, 4, 64)})
    assert [axis_size(turned, a) for a in ("token", "head")] == [64, 4]
    flat = type(site)(**{**vars(site), "shape": ()})
    assert axis_size(flat, "token") == 64


def test_pyplot_is_never_loaded() -> None:
    """It keeps every figure that it made."""
    import subprocess

    code = (
        "import sys, pathlib, tempfile; from divergence.reports import write_all; "
        "from tests.reports.cases import fails; write_all(fails(2), pathlib.Path(tempfile.mkdtemp())); "
        "print([m for m in ('matplotlib.pyplot', 'pandas', 'torch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "[]"


def test_drawing_leaves_the_settings_of_matplotlib_alone() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    with house_style():
        assert len(list(plots(cases.passes(2)))) > 0
    assert dict(mpl.rcParams) == before


def test_labels_of_many_stacks_do_not_run_into_each_other() -> None:
    svg = drawn(cases.several_stacks(), "accumulation-key").figure.axes[0].texts
    assert [t.get_text() for t in svg] == ["vision", "expert", "expert 2", "expert 3"]
    assert not re.search(r"\s$", svg[0].get_text())
