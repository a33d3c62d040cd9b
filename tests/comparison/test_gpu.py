"""The GPU kernel against the definitions and against the CPU's.

Where there is no device, Triton's interpreter runs the kernel on tensors of the CPU (`TRITON_INTERPRET`, set
in conftest.py): all but the exchange of sums between threads, and memory, which tests marked `gpu` look at.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from divergence import comparison, demo
from divergence.comparison import compare_tensors, cpu
from divergence.comparison.metrics import Metrics, reference_metrics
from divergence.config import Config
from divergence.errors import AlignmentError
from divergence.pipeline import compare as judged
from tests.comparison.patterns import BYTES, INTEGERS, reads_every_byte, reads_extremes
from tests.comparison.test_kernel import assert_same_bits, noisy
from tests.comparison.test_properties import assert_same
from tests.strategies import DTYPES, SETTINGS, Case, cases

pytest.importorskip("triton", reason="Triton is not installed")

from divergence.comparison import gpu
from divergence.comparison.tiling import Tiling

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# The interpreter takes half a second a call, and a device compiles for every pair of dtypes and layouts.
FEW = settings(SETTINGS, max_examples=20)

# numpy, which the interpreter computes with, warns where NaN and infinities come up.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TILINGS = st.builds(
    Tiling,
    threads=st.sampled_from((32, 64)),
    run=st.sampled_from((1, 2)),
    rows=st.sampled_from((1, 2, 4)),
    depth=st.sampled_from((4, 8)),
    bits=st.sampled_from((32, 64)),
)


def on_device(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The same values in the same layout."""
    if tensor is None or DEVICE.type == "cpu":
        return tensor
    memory = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
    return memory.copy_(tensor)


def compare(ref: torch.Tensor, cand: torch.Tensor, **options: object) -> Metrics:
    return gpu.compare(on_device(ref), on_device(cand), **options)  # type: ignore[arg-type]


def assert_true(metrics: Metrics, truth: Metrics) -> None:
    """Every figure agrees with the definitions, the place of the largest difference exactly."""
    assert_same(metrics, truth)
    assert metrics.max_abs_at == truth.max_abs_at
    np.testing.assert_array_equal(metrics.error_exponents, truth.error_exponents)


@FEW
@given(cases(), TILINGS, st.sampled_from((2, 5, 1 << 18)), st.sampled_from((0, 1 << 12, 1 << 20)))
def test_it_agrees_with_the_definitions(case: Case, tiling: Tiling, entries: int, memory: int) -> None:
    """Shapes, dtypes, strides, masks and non-finite values, whatever tiling, pooling and memory."""
    options = {"axes": case.axes, "mask": case.mask, "entries": entries}
    found = compare(case.ref, case.cand, tiling=tiling, memory=(memory, memory), **options)
    assert_true(found, reference_metrics(case.ref, case.cand, **options))  # type: ignore[arg-type]


@FEW
@given(cases())
def test_it_agrees_with_the_cpu(case: Case) -> None:
    """With the tiling that shape and dtypes get."""
    found = compare(case.ref, case.cand, axes=case.axes, mask=case.mask)
    assert_true(found, cpu.compare(case.ref, case.cand, axes=case.axes, mask=case.mask))


PAIRS = sorted(
    {(a, b) for a, b in itertools.product(DTYPES, repeat=2) if torch.float32 in {a, b} or a == b}, key=str
)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p[0]}-{p[1]}")
def test_every_pair_of_dtypes(pair: tuple[torch.dtype, torch.dtype]) -> None:
    """Whole strips, one that is cut off, and a masked row."""
    ref, cand = ((3 * t).to(dtype) for t, dtype in zip(noisy(2, 5, 300), pair, strict=True))
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 1] = False
    assert_true(compare(ref, cand, mask=mask), reference_metrics(ref, cand, mask=mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "shape", [(1, 9, 1024), (1, 8, 2080), (2, 8, 4, 256), (2, 2, 8, 96), (4096,), (60, 1)]
)
@pytest.mark.parametrize("entries", [3, 1 << 18])
def test_whole_strips_and_what_is_left(dtype: torch.dtype, shape: tuple[int, ...], entries: int) -> None:
    """Of one head and of several, pooled and not."""
    ref, cand = (t.to(dtype) for t in noisy(*shape))
    assert_true(compare(ref, cand, entries=entries), reference_metrics(ref, cand, entries=entries))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_one_value_that_is_not_finite(bad: float, side: int) -> None:
    """In a strip that is otherwise gone over the fast way: gone over again, and nothing is counted twice."""
    pair = noisy(1, 12, 512)
    pair[side][0, 7, 300] = bad
    tiling = Tiling(32, 4, 4, 4, 32)
    assert_true(compare(*pair, tiling=tiling), reference_metrics(*pair))


@pytest.mark.parametrize("bits", [32, 64])
def test_errors_over_all_of_float64(bits: int) -> None:
    """More powers of two than a word has bits, in strips of the fast way."""
    ref = torch.zeros(4, 1024, dtype=torch.float64)
    cand = torch.from_numpy(np.exp2(np.linspace(-1074, 500, ref.numel()))).reshape(ref.shape)
    tiling = Tiling(32, 2, 4, 4, bits)
    assert_true(compare(ref, cand, tiling=tiling), reference_metrics(ref, cand))


def test_subnormal_differences_of_float32() -> None:
    """Are not flushed to zero."""
    ref = torch.full((4, 256), 2.0**-149)
    m = compare(ref, 3 * ref)
    assert (m.max_abs, m.mean_abs, m.mse) == (2.0**-148, 2.0**-148, 2.0**-296)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_bit_pattern_of_two_bytes(dtype: torch.dtype) -> None:
    """Subnormals, zeros of both signs, infinities and every NaN, read as torch reads them."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    m = compare(values, values.double())
    assert (m.max_abs, m.ref_nonfinite) == (0, int((~values.isfinite()).sum()))
    assert compare(values, values.clone()).bit_equal


@pytest.mark.parametrize("dtype", BYTES)
def test_every_bit_pattern_of_one_byte(dtype: torch.dtype) -> None:
    """As torch reads them."""
    reads_every_byte(compare, dtype)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_extremes_of_integers(dtype: torch.dtype) -> None:
    """As float64 holds them."""
    reads_extremes(compare, dtype)


def test_zeros_of_both_signs_are_not_the_same_bits() -> None:
    """In a strip of the fast way."""
    m = compare(torch.zeros(4, 1024), -torch.zeros(4, 1024))
    assert (m.bit_equal, m.max_abs, m.cosine) == (False, 0, 1)
    assert compare(torch.zeros(4, 1024), torch.zeros(4, 1024)).bit_equal


def test_squares_that_overflow_float64() -> None:
    """Infinite error, no cosine."""
    x = torch.tensor([1e200, 1.0], dtype=torch.float64)
    m = compare(x, -x)
    assert (m.rel_l2, m.cosine, m.max_abs) == (math.inf, None, 2e200)


@pytest.mark.parametrize("rows", [1, 4])
def test_of_several_largest_differences_the_first_counts(rows: int) -> None:
    """In canonical order, in which a head comes before the tokens of the next."""
    ref = torch.zeros(2, 4, 8, 32)
    cand = ref.clone()
    cand[1, 0, 0, 0] = cand[0, 2, 3, 4] = cand[0, 2, 3, 1] = cand[0, 3, 0, 0] = -2.0
    tiling = Tiling(32, 4, rows, 8, 32)
    assert compare(ref, cand, tiling=tiling).max_abs_at == (0, 2, 3, 1)
    assert compare(ref, ref.clone(), tiling=tiling).max_abs_at == (0, 0, 0, 0)


def test_largest_differences_that_only_lower_bits_tell_apart() -> None:
    """In a later tile of the same thread: the upper halves of their bits are equal."""
    ref = torch.zeros(16, 64, dtype=torch.float64)
    cand = ref.clone()
    cand[1, 3], cand[9, 3], cand[13, 2] = 1.0, 1.0 + 2.0**-40, 1.0 + 2.0**-41
    m = compare(ref, cand, tiling=Tiling(32, 2, 4, 16, 64))
    assert (m.max_abs, m.max_abs_at) == (1.0 + 2.0**-40, (9, 3))


def test_figures_of_many_programs_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever program, and whatever launch, has the largest, is miscounted or is not finite."""
    monkeypatch.setattr(gpu, "MOST_FIGURES", 2)
    ref, cand = noisy(2, 37, 512)
    cand[1, 20, 100], ref[0, 3, 7], cand[1, 30, 9] = 2.0**60, math.nan, math.inf
    tiling = Tiling(32, 2, 2, 4, 32)
    found = compare(ref, cand, tiling=tiling, memory=(1 << 12, 1 << 14))
    assert_true(found, reference_metrics(ref, cand))
    assert found.max_abs_at == (1, 20, 100)
    assert compare(ref, ref.clone(), tiling=tiling).bit_equal


def test_wholly_padded_tensors_have_no_figures() -> None:
    """But the largest difference at padding is shown."""
    m = compare(torch.zeros(1, 2, 3), torch.ones(1, 2, 3), mask=torch.zeros(1, 2, dtype=torch.bool))
    assert (m.elements, m.mse, m.ref_min, m.padded_max_abs) == (0, None, None, 1.0)


def test_what_the_kernel_cannot_read_is_compared_on_the_cpu() -> None:
    """Head axes that are not one in memory."""
    x = torch.randn(3, 2, 2, 4, 5, generator=torch.Generator().manual_seed(0)).permute(1, 0, 4, 3, 2)
    y = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    assert_true(compare(x, y), reference_metrics(x, y))


def test_what_cannot_be_compared_is_an_error() -> None:
    """The same as on the CPU."""
    with pytest.raises(AlignmentError, match="nothing to compare"):
        compare(torch.ones(0, 3), torch.ones(0, 3))
    with pytest.raises(AlignmentError, match="shape"):
        compare(torch.ones(2, 3), torch.ones(3, 2))
    values = torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(AlignmentError, match="float4_e2m1fn_x2; convert"):
        compare(values, values)


def test_the_cpu_compares_what_lies_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the GPU nothing that it does not have."""
    monkeypatch.setattr(gpu, "compare", None)
    assert compare_tensors(torch.ones(3), np.ones(3)).max_abs == 0


@pytest.mark.gpu
def test_the_gpu_compares_what_lies_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the CPU's kernel."""
    monkeypatch.setattr(cpu, "compare", None)
    ref, cand = noisy(1, 970, 2048)
    found = compare_tensors(ref.cuda(), cand.cuda())
    monkeypatch.undo()
    assert_true(found, reference_metrics(ref, cand))


@pytest.mark.gpu
def test_tensors_of_the_host_are_brought_to_the_gpu_while_a_model_runs_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ref, cand = noisy(2, 970, 256)
    mask = torch.arange(970) < torch.tensor([[970], [900]])
    expected = reference_metrics(ref, cand, mask=mask)
    with comparison.on_device(DEVICE):
        with monkeypatch.context() as without:
            without.setattr(cpu, "compare", None)
            assert_true(compare_tensors(ref, cand, mask=mask), expected)
        with monkeypatch.context() as small:
            small.setattr(comparison, "BROUGHT", 1000)
            small.setattr(gpu, "compare", None)
            assert_true(compare_tensors(ref, cand, mask=mask), expected)
        with monkeypatch.context() as full:
            full.setattr(gpu, "compare", _out_of_memory)
            assert_true(compare_tensors(ref, cand, mask=mask), expected)
        with pytest.raises(AlignmentError, match="shape"):
            compare_tensors(ref, cand[:, 1:])
    with monkeypatch.context() as afterwards:
        afterwards.setattr(gpu, "compare", None)
        assert_true(compare_tensors(ref, cand, mask=mask), expected)


def _out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
@pytest.mark.parametrize("shape", [(2, 8, 256, 128), (1, 300000, 64), (3, 800000), (1, 33, 1007)])
def test_large_tensors_in_several_programs(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """In several launches, pooled, and with rows that are not aligned; the same bits each time."""
    ref, cand = ((20 * t).to(dtype) for t in noisy(*shape))
    found = compare(ref, cand)
    assert_true(found, reference_metrics(ref, cand))
    assert_same_bits(compare(ref, cand), found)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 1 << 18, 1024), (1, 32, 2048, 4096), (1 << 28,)])
def test_memory_beside_the_tensors_stays_under_64_mib(shape: tuple[int, ...]) -> None:
    """Whatever the tensor: a float64 copy would be 2 GiB."""
    ref = torch.ones(shape, device="cuda")
    cand = ref * 1.01
    ref.view(-1)[::1000] = torch.nan
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert compare_tensors(ref, cand).unlike_nan == -(-ref.numel() // 1000)
    assert torch.cuda.max_memory_allocated() - before < 64 << 20


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("exponent", [0, 80])
def test_tensors_of_a_device_that_is_not_current_are_waited_for(exponent: int) -> None:
    """On their device, whose stream is what makes them; some with errors that are counted once more."""
    ref, cand = noisy(2, 8, 256, 128)
    cand.view(-1)[0] = 2.0**exponent
    truth = reference_metrics(ref, cand)
    # Both devices are in use, and reach each other: a kernel would run on the wrong one too.
    there = [tensor.to("cuda:0").to("cuda:1") for tensor in (ref, cand)]
    gpu.compare(*there)  # compiles
    torch.ones(1, device="cuda:0")
    assert torch.cuda.current_device() == 0
    for _ in range(3):
        with torch.cuda.device(1):
            torch.cuda._sleep(50_000_000)
        assert_true(gpu.compare(*(tensor.clone() for tensor in there)), truth)


@pytest.mark.gpu
def test_a_model_on_a_gpu_is_judged_without_the_kernel_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures lie in host memory, floors and replayed layers on the device: all are compared there."""
    faulty = demo.load().cuda()
    with torch.no_grad():
        faulty.layers[1].self_attn.v_proj.weight.mul_(1.02)  # type: ignore[union-attr,operator]
    monkeypatch.setattr(cpu, "compare", None)
    result = judged(demo.load().cuda(), faulty, demo.inputs(tokens=24), precision="bf16", config=Config())
    assert result.verdict == "fail"
    assert result.first_divergence is not None
    assert result.first_divergence.site == "layers.1.value"
