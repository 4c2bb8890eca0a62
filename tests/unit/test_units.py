"""Sizes and durations, as they are written and as they are read."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbcache.errors import InvalidOption
from nbcache.units import format_duration, format_idle, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("1024", 1024),
        ("7B", 7),
        ("1K", 1000),
        ("48G", 48 * 10**9),
        ("48 GB", 48 * 10**9),
        ("48gb", 48 * 10**9),
        ("48GiB", 48 << 30),
        ("48 gib", 48 << 30),
        ("1.5M", 1_500_000),
        ("0.5KiB", 512),
        ("2T", 2 * 10**12),
        ("2TiB", 2 << 40),
        ("  3 k ", 3000),
        ("64Gi", 64 << 30),
    ],
)
def test_a_size_is_read_in_decimal_or_binary_units(text, size_bytes):
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    ["", " ", "G", "GB", "-1", "-1G", "+1", "1.G", ".5G", "1,5G", "1e9", "0x10", "1 iB",
     "1i", "1P", "1GG", "1G1", "one", "1_000", "nan", "inf", "half", "1GiBB"],
)  # fmt: skip
def test_what_is_no_size_is_an_invalid_option_that_quotes_it(text):
    with pytest.raises(InvalidOption, match=re.escape(repr(text))):
        parse_size(text)


@given(st.integers(0, 1 << 62))
def test_bytes_are_read_exactly(size_bytes):
    assert parse_size(str(size_bytes)) == size_bytes


def test_a_size_beyond_all_numbers_is_a_size_or_an_invalid_option():
    try:
        assert parse_size("9" * 400) == int("9" * 400)
    except InvalidOption as error:
        assert "is not a size" in str(error)


@given(st.text(max_size=8))
def test_any_text_is_a_size_or_an_invalid_option(text):
    with contextlib.suppress(InvalidOption):
        assert parse_size(text) >= 0


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (7, "7 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_900, "99.9 kB"),
        (99_960, "100 kB"),
        (512_000, "512 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (23_800_000_000, "23.8 GB"),
        (32 * 10**9, "32.0 GB"),
        (128 * 10**9, "128 GB"),
        (10**12, "1.0 TB"),
        (12_345 * 10**12, "12345.0 TB"),
    ],
)
def test_a_size_is_written_with_three_digits(size_bytes, text):
    assert format_size(size_bytes) == text


@given(st.integers(0, 10**15))
def test_a_written_size_reads_back_as_nearly_the_same(size_bytes):
    assert parse_size(format_size(size_bytes)) == pytest.approx(size_bytes, rel=0.06)


@pytest.mark.parametrize(("idle_s", "text"), [(0.0, "under 1 s"), (1.2, "1 s"), (59.7, "60 s"), (120.0, "2 min")])
def test_how_long_something_is_idle_is_said_to_the_second(idle_s, text):
    assert format_idle(idle_s) == text


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0.0, "0.0 ms"),
        (0.0008, "0.8 ms"),
        (0.25, "250.0 ms"),
        (1.0, "1.0 s"),
        (99.9, "99.9 s"),
        (120.0, "2 min"),
        (12 * 60.0, "12 min"),
        (100 * 60.0, "2 h"),
        (5 * 3600.0, "5 h"),
    ],
)
def test_a_duration_is_written_in_the_unit_that_suits_it(duration_s, text):
    assert format_duration(duration_s) == text
