from __future__ import annotations

import pytest

from divergence import errors
from divergence.errors import DivergenceError, nearest, one_line


def test_all_errors_share_one_base_and_are_in_the_tree() -> None:
    named = {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, DivergenceError)
    }
    assert len(named) == 7
    for name in named:
        assert name in (errors.__doc__ or "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("bad"), "ValueError: bad"),
        (ValueError("\n\n  second line \nthird"), "ValueError: second line"),
        (ValueError("no\nthe shapes differ\nat all"), "ValueError: no the shapes differ"),
        (ValueError("no"), "ValueError: no"),
        (ValueError(), "ValueError"),
        (KeyError("k"), "KeyError: 'k'"),
    ],
)
def test_an_exception_becomes_one_line_with_its_type(error: Exception, line: str) -> None:
    assert one_line(error) == line


def test_a_long_message_is_cut_to_the_limit() -> None:
    line = one_line(RuntimeError("x" * 1000), limit=50)
    assert len(line) == 50
    assert line.endswith("...")


def test_the_nearest_name_is_offered_and_nothing_where_none_is_near() -> None:
    assert nearest("cosin", ["mse", "cosine"]) == "; did you mean 'cosine'?"
    assert nearest("cosin", []) == ""
    assert nearest("zzz", ["mse", "cosine"]) == ""
