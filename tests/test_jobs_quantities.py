"""Sizes and counts as users write them."""

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farspan.schema import parse_bytes, parse_count

BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BYTES |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "k": 10**3, "gib": 2**30}
COUNTS = {"k": 2**10, "M": 2**20, "G": 2**30, "K": 2**10, "m": 2**20}


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 999), st.sampled_from(sorted(BYTES)), st.sampled_from(["", " "]))
def test_bytes_against_decimal_arithmetic(whole, thousandths, unit, space):
    text = f"{whole}.{thousandths:03d}"
    assert parse_bytes(f"{space}{text}{space}{unit}") == int(Decimal(text) * BYTES[unit])


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 999), st.sampled_from(sorted(COUNTS)))
def test_counts_against_decimal_arithmetic(whole, thousandths, unit):
    text = f"{whole}.{thousandths:03d}"
    assert parse_count(text + unit) == int(Decimal(text) * COUNTS[unit])


@settings(deadline=None)
@given(st.integers(-(10**18), 10**18))
def test_plain_integers_are_exact(number):
    assert parse_count(str(number)) == number
    assert parse_bytes(str(abs(number))) == abs(number)
    assert parse_count(number) is number


@pytest.mark.parametrize(
    ("text", "expected"), [("2^20", 2**20), ("2 ^ 3", 8), ("1e6", 10**6), ("1.5e3", 1500), ("8k", 8192), (".5M", 2**19)]
)
def test_counts(text, expected):
    assert parse_count(text) == expected


@settings(deadline=None)
@given(st.text(max_size=12))
def test_any_text_is_a_number_or_a_value_error(text):
    for parse in (parse_bytes, parse_count):
        try:
            assert isinstance(parse(text), int)
        except ValueError as problem:
            assert "is not a" in str(problem)


@pytest.mark.parametrize("text", ["", "k", "8q", "1.5", "inf", "-inf", "nan", "1e999", "8 k k", "2^2^2", "9^999999999"])
def test_what_is_not_a_count(text):
    with pytest.raises(ValueError, match="is not a count"):
        parse_count(text)


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1e3", "inf", "70 giga", "1PiB"])
def test_what_is_not_a_size(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)
