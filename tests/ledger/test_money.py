"""Money is exact: nothing is rounded before it is shown or invoiced."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from awan.kit.money import (
    HOURS_PER_MONTH,
    MINOR_DIGITS,
    display_hourly,
    display_u720,
    minor_digits,
    u720_to_minor,
)

monthly = st.integers(0, 10**12)
units = st.integers(-(10**15), 10**15)


@given(monthly, st.integers(1, 1000))
def test_a_month_of_hours_costs_exactly_the_month(price: int, quantity: int) -> None:
    assert u720_to_minor(price * quantity * HOURS_PER_MONTH) == price * quantity


@given(units)
def test_rounding_is_half_up_and_symmetric(value: int) -> None:
    exact = Fraction(value, HOURS_PER_MONTH)
    rounded = u720_to_minor(value)
    assert abs(rounded - exact) <= Fraction(1, 2)
    assert u720_to_minor(-value) == -rounded
    if abs(rounded - exact) == Fraction(1, 2):
        assert abs(rounded) > abs(exact)


@given(units, st.sampled_from(sorted(MINOR_DIGITS)))
def test_display_is_within_half_a_cent_of_the_truth(value: int, currency: str) -> None:
    shown = display_u720(value, currency)
    exact = Fraction(value, HOURS_PER_MONTH * 10 ** MINOR_DIGITS[currency])
    assert abs(Fraction(Decimal(shown)) - exact) <= Fraction(1, 200)
    assert shown.partition(".")[2].isdigit()
    assert len(shown.partition(".")[2]) == 2
    assert "E" not in shown


@pytest.mark.parametrize(
    ("price", "currency", "shown"),
    [
        (230_000, "IDR", "319.44"),
        (485_000, "IDR", "673.61"),
        (235_440, "IDR", "327.00"),
        (0, "IDR", "0.00"),
        (720_00, "USD", "1.00"),
        (360, "USD", "0.01"),
        (359, "USD", "0.00"),
    ],
)
def test_known_prices(price: int, currency: str, shown: str) -> None:
    assert display_hourly(price, currency) == shown


def test_the_rupiah_has_no_smaller_unit() -> None:
    assert minor_digits("IDR") == 0
    with pytest.raises(ValueError, match="unknown currency"):
        minor_digits("XXX")
