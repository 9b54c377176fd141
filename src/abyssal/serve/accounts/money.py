"""Money as whole billionths of a currency's unit (nano-dollars), so that sums are exact.

A price of $0.07 a 1M tokens is 70 billionths a token: every price in use is whole in these units, and a signed 64-bit
integer holds nine billion dollars of them.
"""

from __future__ import annotations

from decimal import Context, Decimal, Inexact, InvalidOperation, localcontext

NANO = 1_000_000_000
MOST_NANO = 2**62 // NANO * NANO
"""The largest balance either way: sqlite's integers end at 2^63, and a charge on top must still fit."""
_DIGITS = 9
_EXACT = Context(prec=40, traps=[Inexact])


def parse_money(text: str | int | Decimal) -> int:
    """Billionths, of an amount such as ``"12.50"``.

    Raises:
        ValueError: no number, finer than a billionth, or too large.
    """
    try:
        amount = Decimal(text)
    except InvalidOperation:
        amount = Decimal("NaN")
    if amount.is_nan():
        raise ValueError(f"{str(text)!r} is not an amount of money: write it as 12.50")
    if amount.copy_abs() > MOST_NANO // NANO:  # before a number of a million digits is made of it
        raise ValueError(f"{text} is more money than can be counted here ({format_money(MOST_NANO)})")
    try:
        with localcontext(_EXACT):
            return int((amount * NANO).to_integral_exact())
    except Inexact:
        raise ValueError(f"{text} is finer than a billionth") from None


def format_money(nano: int) -> str:
    """Exact, with at least two decimals: ``-0.0000175`` or ``12.50``."""
    whole, fraction = divmod(abs(nano), NANO)
    decimals = f"{fraction:0{_DIGITS}d}".rstrip("0").ljust(2, "0")
    return f"{'-' if nano < 0 else ''}{whole}.{decimals}"
