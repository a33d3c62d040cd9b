"""Single figures whose value is known beforehand."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from divergence.comparison import compare_tensors
from divergence.comparison.cpu import compare
from divergence.comparison.metrics import binned, reference_metrics
from divergence.errors import AlignmentError


def test_figures_of_a_small_example() -> None:
    """Worked by hand: differences 0, 0, 3, 4 against a reference of norm 5."""
    ref = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    m = compare_tensors(ref, torch.tensor([[3.0, 4.0], [3.0, -4.0]]))
    assert (m.elements, m.compared, m.bit_equal) == (4, 4, False)
    assert (m.mse, m.max_abs, m.max_abs_at, m.mean_abs) == (25 / 4, 4.0, (1, 1), 7 / 4)
    assert (m.ref_norm, m.error_norm, m.rel_l2) == (5.0, 5.0, 1.0)
    assert m.cosine == pytest.approx((9 + 16) / (5 * math.sqrt(50)))
    assert (m.ref_min, m.ref_max, m.cand_min, m.cand_max) == (0.0, 4.0, -4.0, 4.0)
    assert m.token.tolist() == [[0.0, math.inf]]
    assert m.row_rel_l2 == math.inf
    assert m.channel.tolist() == [1.0, 1.0]
    assert m.head.size == 0


def test_bfloat16_rounding_of_fp32_reads_its_true_cosine() -> None:
    """About 0.9999986; accumulating in bfloat16 or fp32 would read 0.99983."""
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    m = compare_tensors(x, x.bfloat16())
    truth = torch.nn.functional.cosine_similarity(
        x.double().flatten(), x.bfloat16().double().flatten(), dim=0
    )
    assert m.cosine == pytest.approx(float(truth), abs=1e-12)
    assert m.cosine == pytest.approx(0.9999986, abs=1e-7)


def test_one_massive_channel_hides_nothing_from_the_profiles() -> None:
    """Every ordinary channel is off by 1e-3; the whole tensor's error hides behind one of 48000."""
    ref = torch.ones(1, 16, 64)
    ref[..., 7] = 48000.0
    cand = ref.clone()
    cand[..., torch.arange(64) != 7] += 1e-3
    m = compare_tensors(ref, cand)
    assert m.rel_l2 is not None
    assert m.rel_l2 < 1e-6
    assert float(np.median(m.channel)) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("ref", "cand", "rel_l2", "cosine"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0.0, 1.0),
        ([0.0, 0.0], [0.0, 1.0], math.inf, 0.0),
        ([0.0, 1.0], [0.0, 0.0], 1.0, 0.0),
        ([1.0, 1.0], [-1.0, -1.0], 2.0, -1.0),
    ],
)
def test_zero_norms(ref: list[float], cand: list[float], rel_l2: float, cosine: float) -> None:
    """0/0 is no error, and an error over nothing is infinite."""
    m = compare_tensors(torch.tensor(ref), torch.tensor(cand))
    assert m.rel_l2 == rel_l2
    assert m.cosine == pytest.approx(cosine, abs=1e-15)


def test_negative_zero_is_not_the_same_bits() -> None:
    """Though the difference is zero."""
    m = compare_tensors(torch.zeros(3), -torch.zeros(3))
    assert not m.bit_equal
    assert m.max_abs == 0


def test_another_dtype_is_not_the_same_bits() -> None:
    """Though all values are equal."""
    assert not compare_tensors(torch.ones(3), torch.ones(3).half()).bit_equal


def test_nan_against_zero_is_no_perfect_score() -> None:
    """NaN is counted, and where nothing else is left no figure exists."""
    m = compare_tensors(torch.zeros(2, 2), torch.full((2, 2), math.nan))
    assert (m.cand_nonfinite, m.ref_nonfinite, m.compared, m.elements) == (4, 0, 0, 4)
    assert (m.mse, m.rel_l2, m.row_rel_l2, m.cosine, m.max_abs, m.max_abs_at) == (None,) * 6
    assert (m.ref_min, m.cand_min) == (0.0, None)
    assert np.isnan(m.token).all()


def test_equal_infinities_are_counted_on_both_sides() -> None:
    """And do not become a difference of NaN."""
    x = torch.tensor([1.0, math.inf, -math.inf])
    m = compare_tensors(x, x.clone())
    assert (m.ref_nonfinite, m.cand_nonfinite, m.mse, m.bit_equal) == (2, 2, 0.0, True)


def test_wholly_padded_tensors_have_no_figures() -> None:
    """But the largest difference at padding is shown."""
    m = compare_tensors(torch.zeros(1, 2, 3), torch.ones(1, 2, 3), mask=torch.zeros(1, 2, dtype=torch.bool))
    assert (m.elements, m.mse, m.ref_min, m.padded_max_abs) == (0, None, None, 1.0)


def test_float64_overflow_is_never_a_good_figure() -> None:
    """Squares beyond float64: infinite error, no cosine."""
    x = torch.tensor([1e200, 1.0], dtype=torch.float64)
    m = compare_tensors(x, -x)
    assert (m.rel_l2, m.cosine, m.max_abs) == (math.inf, None, 2e200)


@pytest.mark.parametrize(
    ("shape", "token", "head", "channel"),
    [
        ((), (1, 1), (0,), (1,)),
        ((5,), (1, 1), (0,), (5,)),
        ((4, 5), (1, 4), (0,), (5,)),
        ((2, 4, 5), (2, 4), (0,), (5,)),
        ((2, 3, 4, 5), (2, 4), (3,), (3, 5)),
        ((2, 3, 2, 4, 5), (2, 4), (6,), (6, 5)),
    ],
)
def test_axes_without_names(
    shape: tuple[int, ...], token: tuple[int, ...], head: tuple[int, ...], channel: tuple[int, ...]
) -> None:
    """Channel last, token before it, batch first, heads between, any number of axes."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    m = compare_tensors(x, x + 1)
    assert (m.token.shape, m.head.shape, m.channel.shape) == (token, head, channel)
    assert m.max_abs_at is not None
    assert len(m.max_abs_at) == len(shape)


def test_head_axes_that_memory_cannot_merge() -> None:
    """Are gone through one by one, to the same result."""
    x = torch.randn(3, 2, 2, 4, 5, generator=torch.Generator().manual_seed(0)).permute(1, 0, 4, 3, 2)
    y = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    fast, truth = compare(x, y, box=7), reference_metrics(x, y)
    assert fast.mse == pytest.approx(truth.mse, rel=1e-14)
    assert fast.max_abs_at == truth.max_abs_at
    np.testing.assert_allclose(fast.channel, truth.channel, rtol=1e-14)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "uint16", "bool"])
def test_numpy_arrays_are_read_as_tensors(dtype: str) -> None:
    """The same figures as for torch tensors of these values, read-only arrays included."""
    array = np.arange(12).reshape(3, 4).astype(dtype)
    array.flags.writeable = False
    m = compare_tensors(array, torch.from_numpy(array.astype("float64")))
    assert m.max_abs == 0


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0)[::-1],
        np.arange(6).astype(">f4"),
        np.arange(6.0, dtype=np.longdouble),
        np.float32(3),
    ],
    ids=["negative strides", "big-endian", "longdouble", "scalar"],
)
def test_arrays_that_torch_cannot_view(array: np.ndarray) -> None:
    """Are compared all the same."""
    assert compare_tensors(array, np.array(array, dtype=np.float64)).max_abs == 0


def test_bfloat16_arrays_of_ml_dtypes() -> None:
    """Which numpy itself does not know."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = torch.randn(8, generator=torch.Generator().manual_seed(0)).bfloat16()
    array = x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    assert compare_tensors(x, array).bit_equal


def test_memory_mapped_arrays(tmp_path: Path) -> None:
    """Are read from disk as they are, without a warning."""
    np.save(tmp_path / "x.npy", np.arange(6.0))
    assert compare_tensors(np.load(tmp_path / "x.npy", mmap_mode="r"), np.arange(6.0)).bit_equal


@pytest.mark.parametrize(
    ("ref", "cand", "axes", "mask", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), (), None, r"shape \[2, 3\] .* shape \[3, 2\]"),
        (torch.ones(0, 3), torch.ones(0, 3), (), None, "nothing to compare"),
        (torch.ones(2, 3), torch.ones(2, 3), ("token",), None, "do not name the axes"),
        (torch.ones(2, 3), torch.ones(2, 3), ("token", "token"), None, "none twice"),
        (torch.ones(2, 3), torch.ones(2, 3), ("token", "time"), None, "batch, head, token, channel"),
        (torch.ones(2, 3), torch.ones(2, 3), (), torch.ones(2, 3), r"here \[1, 2\]"),
        (torch.ones(2) * 1j, torch.ones(2), (), None, "real numbers"),
        (np.array(["a"]), np.array(["a"]), (), None, "real numbers"),
        ([1.0], [1.0], (), None, "list"),
    ],
)
def test_what_cannot_be_compared(
    ref: torch.Tensor, cand: torch.Tensor, axes: tuple[str, ...], mask: torch.Tensor | None, message: str
) -> None:
    """Is an error of one line that says why."""
    with pytest.raises(AlignmentError, match=message) as caught:
        compare_tensors(ref, cand, axes=axes, mask=mask)
    assert "\n" not in str(caught.value)


def test_results_do_not_depend_on_threads() -> None:
    """Beyond a relative 1e-12: the order of addition changes."""
    x = torch.randn(300, 700, generator=torch.Generator().manual_seed(0))
    y = x + 1e-3 * torch.randn(300, 700, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, before):
            torch.set_num_threads(threads)
            results.append(compare(x, y, box=1 << 16))
    finally:
        torch.set_num_threads(before)
    one, other = results
    for name in ("mse", "rel_l2", "row_rel_l2", "cosine", "mean_abs"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-12)


def test_bins_are_relative_errors_over_their_members() -> None:
    """As equal in length as can be; one without members is NaN."""
    err2, ref2, count = (
        np.array([1.0, 3.0, 0.0, 9.0]),
        np.array([1.0, 0.0, 0.0, 1.0]),
        np.array([1.0, 1, 0, 1]),
    )
    assert binned(err2, ref2, count, 4)[0] == 1.0
    assert math.isnan(binned(err2, ref2, count, 4)[2])
    assert binned(err2, ref2, count, 2) == (2.0, 3.0)
    assert len(binned(np.ones(1000), np.ones(1000), np.ones(1000))) == 64
    assert binned(np.zeros(0), np.zeros(0), np.zeros(0)) == ()


def test_profile_pools_the_batch_and_the_heads() -> None:
    """At most 64 entries an axis."""
    x = torch.ones(2, 3, 100, 8)
    y = x.clone()
    y[:, 1] += 0.5
    profile = compare_tensors(x, y).profile()
    assert len(profile.token) == 64
    assert profile.head == (0.0, 0.5, 0.0)
    assert profile.channel == pytest.approx((math.sqrt(0.25 / 3),) * 8)


_MEASURE = """
import resource, sys, torch
from divergence.comparison import compare_tensors
ref = torch.ones(eval(sys.argv[1]), dtype=torch.bfloat16)
cand = ref * 1.01
ref.view(-1)[::1000] = torch.nan
compare_tensors(ref.flatten()[:1000], cand.flatten()[:1000])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
compare_tensors(ref, cand)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["(1 << 24,)", "(1 << 18, 64)", "(4, 16, 1 << 11, 128)"])
def test_memory_beside_the_tensors_stays_under_64_mib(shape: str) -> None:
    """Also where some of the reference is NaN: a float64 copy of one alone would be 128 MiB."""
    done = subprocess.run(  # peak memory is a process's own
        [sys.executable, "-c", _MEASURE, shape], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 64 << 10


@pytest.mark.parametrize(
    ("odd", "kind"),
    [
        (torch.empty(2, 3, device="meta"), "meta"),
        (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged), "nested"),
        (torch.zeros(2, 3).to_sparse(), "sparse"),
    ],
)
def test_tensors_without_values_of_their_own_are_refused(odd: torch.Tensor, kind: str) -> None:
    with pytest.raises(AlignmentError, match=f"the reference is a {kind} tensor"):
        compare_tensors(odd, torch.zeros(2, 3))
    with pytest.raises(AlignmentError, match=f"the candidate is a {kind} tensor"):
        compare_tensors(torch.zeros(2, 3), odd)
