"""Money, exactly.

The ledger counts **units**: integers of 1/720 of the currency's minor unit. A month is 720 hours, so an hour of an
item that costs P minor units a month is exactly P units, and nothing is rounded inside the ledger. Rounding happens
twice only: for display, and (half up to the minor unit) when an invoice line or a tax is booked.

Names carry their unit: `_minor` is an integer of minor units, `_u720` an integer of ledger units.
"""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

HOURS_PER_MONTH = 720

# The rupiah has no smaller unit in practice, whatever ISO 4217 says, so the table is our own.
MINOR_DIGITS = {"IDR": 0, "USD": 2, "EUR": 2, "SGD": 2}


def minor_digits(currency: str) -> int:
    """Decimal digits of the currency. Raises: ValueError for one we do not know."""
    try:
        return MINOR_DIGITS[currency]
    except KeyError:
        raise ValueError(f"unknown currency {currency!r}") from None


def u720_to_minor(units: int) -> int:
    """Ledger units as minor units, rounded half up (away from zero at the half, for both signs)."""
    return int((Decimal(units) / HOURS_PER_MONTH).quantize(Decimal(1), rounding=ROUND_HALF_UP))


def display_u720(units: int, currency: str, digits: int = 2) -> str:
    """Ledger units in major units of the currency with `digits` decimals, half up: `"319.44"`. For display only."""
    major = Decimal(units) / HOURS_PER_MONTH / (Decimal(10) ** minor_digits(currency))
    return str(major.quantize(Decimal(1).scaleb(-digits), rounding=ROUND_HALF_UP))


def display_hourly(monthly_minor: int, currency: str) -> str:
    """An hourly price with two decimals, half up: monthly / 720. For display only."""
    return display_u720(monthly_minor, currency)
