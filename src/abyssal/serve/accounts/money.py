"""Money as whole billionths of a currency's unit (nano-dollars), so that sums are exact.

A price of $0.07 a 1M tokens is 70 billionths a token: every price in use is whole in these units, and a signed 64-bit
integer holds nine billion dollars of them.
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

NANO = 1_000_000_000
MOST_NANO = 2**62
"""The largest balance either way: sqlite's integers end at 2^63, and a charge on top must still fit."""
_DIGITS = 9


def parse_money(text: str | int | Decimal) -> int:
    """Billionths, of an amount such as ``"12.50"``.

    Raises:
        ValueError: no number, finer than a billionth, or too large.
    """
    try:
        amount = Decimal(text) * NANO
        whole = int(amount)
    except (InvalidOperation, ValueError, OverflowError):
        raise ValueError(f"{text!r} is not an amount of money: write it as 12.50") from None
    if amount != whole:
        raise ValueError(f"{text} is finer than a billionth")
    if abs(whole) > MOST_NANO:
        raise ValueError(f"{text} is more money than can be counted here ({format_money(MOST_NANO)})")
    return whole


def format_money(nano: int) -> str:
    """Exact, with at least two decimals: ``-0.0000175`` or ``12.50``."""
    whole, fraction = divmod(abs(nano), NANO)
    decimals = f"{fraction:0{_DIGITS}d}".rstrip("0").ljust(2, "0")
    return f"{'-' if nano < 0 else ''}{whole}.{decimals}"
