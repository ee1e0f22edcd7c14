"""Ledger: at which price a resource was sold, and when it was in use."""

from awan.ledger.service import (
    close_spans,
    lock_prices,
    locked_prices,
    monthly_prices,
    open_spans,
    spans_of,
)

__all__ = [
    "close_spans",
    "lock_prices",
    "locked_prices",
    "monthly_prices",
    "open_spans",
    "spans_of",
]
