"""Checks of arguments: what passes, and what the errors say."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest

from curation.checks import check_choice, check_flag, check_integer, check_number, check_seed, check_text

NO_NUMBERS = (True, np.True_, "1", None, [1], 1j, math.nan, np.float32("nan"))


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("(0, 1]", (0.5, 1, np.float32(0.5), np.int64(1), Fraction(1, 2)), (0, -1, 1.5, math.inf, 10**400)),
        ("[0, 1)", (0, 0.999), (1, -0.1)),
        ("[0, inf)", (0, 1e300), (math.inf, -math.inf, 10**400, -1e-9)),
        ("[-inf, inf]", (math.inf, -math.inf, 0), ()),
        ("[0, 1e6]", (1e6, 0), (1e7,)),
    ],
)
def test_a_number_lies_in_its_interval(interval, inside, outside):
    for value in inside:
        number = check_number("x", value, interval)
        assert type(number) is float
        assert number == value
    for value in (*outside, *NO_NUMBERS):
        message = re.escape(f"Argument `x` must be in {interval}, but got {value!r}.")
        with pytest.raises(ValueError, match=f"^{message}$"):
            check_number("x", value, interval)


def test_what_is_optional_may_be_none():
    assert check_number("x", None, "(0, 1]", optional=True) is None
    assert check_integer("x", None, 1, optional=True) is None
    assert check_text("x", None, optional=True) is None
    with pytest.raises(ValueError, match=r"Argument `x` must be in \(0, 1\] or None, but got 2"):
        check_number("x", 2, "(0, 1]", optional=True)
    with pytest.raises(ValueError, match="Argument `x` must be an integer >= 1 or None, but got 0"):
        check_integer("x", 0, 1, optional=True)
    with pytest.raises(ValueError, match="Argument `x` must be a string or None, but got 0"):
        check_text("x", 0, optional=True)


def test_an_integer_lies_in_its_range():
    for value in (1, np.int32(2), np.uint8(3), 10**30):
        integer = check_integer("n", value, 1)
        assert type(integer) is int
        assert integer == value
    for value in (0, -1, 1.0, np.float64(2), math.inf, *NO_NUMBERS):
        message = re.escape(f"Argument `n` must be an integer >= 1, but got {value!r}.")
        with pytest.raises(ValueError, match=f"^{message}$"):
            check_integer("n", value, 1)
    assert check_integer("n", 3, 1, 4) == 3
    with pytest.raises(ValueError, match=r"^Argument `n` must be an integer in \[1, 4\), but got 4\.$"):
        check_integer("n", 4, 1, 4)


def test_a_seed_fits_a_generator():
    assert check_seed(2**63 - 1) == 2**63 - 1
    for value in (-1, 2**63, 0.0, *NO_NUMBERS):
        message = re.escape(f"Argument `seed` must be an integer in [0, 2^63), but got {value!r}.")
        with pytest.raises(ValueError, match=f"^{message}$"):
            check_seed(value)


def test_flags_texts_and_choices():
    assert check_flag("x", False) is False
    assert check_text("x", "") == ""
    assert check_choice("x", "a", ("a",)) == "a"
    for value in (0, 1, None, "True", np.True_):
        with pytest.raises(ValueError, match=re.escape(f"Argument `x` must be True or False, but got {value!r}.")):
            check_flag("x", value)
    for value in (0, None, b"a", ["a"]):
        with pytest.raises(ValueError, match=re.escape(f"Argument `x` must be a string, but got {value!r}.")):
            check_text("x", value)
    for choices, listed in ((("a",), "'a'"), (("a", "b"), "'a' or 'b'"), (("a", "b", "c"), "'a', 'b' or 'c'")):
        for value in ("d", "", None, 1, ["a"], {"a": 1}):
            with pytest.raises(ValueError, match=re.escape(f"Argument `x` must be {listed}, but got {value!r}.")):
                check_choice("x", value, choices)
