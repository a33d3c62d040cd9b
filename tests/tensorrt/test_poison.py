from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from divergence.probes.tensorrt.poison import NAN_BYTE, OTHER_BYTE, differences, unwritten

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
]
BYTES = st.sampled_from([0, 1, 0x7F, OTHER_BYTE, NAN_BYTE])


def tensor(octets: list[int], dtype: torch.dtype) -> torch.Tensor:
    whole = len(octets) // dtype.itemsize * dtype.itemsize
    return torch.tensor(octets[:whole], dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(pairs=st.lists(st.tuples(BYTES, BYTES), max_size=64))
def test_elements_are_told_by_all_of_their_bytes(dtype: torch.dtype, pairs: list[tuple[int, int]]) -> None:
    a, b = ([pair[side] for pair in pairs] for side in (0, 1))
    first, second = ({"x": tensor(octets, dtype)} for octets in (a, b))
    size = dtype.itemsize
    elements = [(a[i : i + size], b[i : i + size]) for i in range(0, len(pairs) // size * size, size)]
    other = sum(one != two for one, two in elements)
    never = sum(one == [NAN_BYTE] * size and two == [OTHER_BYTE] * size for one, two in elements)
    assert differences(first, second) == ({"x": other} if other else {})
    assert unwritten(first, second) == ({"x": never} if never else {})


def test_nan_equals_itself_and_minus_zero_is_not_zero() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert differences({"x": nan}, {"x": nan.clone()}) == {}
    assert differences({"x": torch.tensor([0.0])}, {"x": torch.tensor([-0.0])}) == {"x": 1}


def test_tensors_with_gaps_are_read_in_their_order() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    assert differences({"x": whole.T}, {"x": whole.T.contiguous()}) == {}
    assert differences({"x": whole.T}, {"x": whole.reshape(4, 3)}) == {"x": 10}
