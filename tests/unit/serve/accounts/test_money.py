"""Amounts of money."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abyssal.serve.accounts.money import MOST_NANO, NANO, format_money, parse_money


@given(st.integers(-MOST_NANO, MOST_NANO))
def test_what_is_written_reads_the_same(nano: int) -> None:
    assert parse_money(format_money(nano)) == nano


def test_examples() -> None:
    assert parse_money("12.5") == 12_500_000_000 == parse_money(Decimal("12.50"))
    assert parse_money(3) == 3 * NANO
    assert [format_money(n) for n in (0, -NANO // 2, 17_500, NANO * 110)] == ["0.00", "-0.50", "0.0000175", "110.00"]


WORDS = ["", "a", "1,5", "nan", "inf", "-Infinity"]
TOO_FINE = ["0.0000000001", "1.00000000000000000000000000000000001", "1e-999999999"]
TOO_LARGE = ["1e30", "1e999999", "1e999999999", "1" + "0" * 40, "-4611686019"]


@pytest.mark.parametrize("text", WORDS + TOO_FINE + TOO_LARGE)
def test_bad_amounts(text: str) -> None:
    with pytest.raises(ValueError):
        parse_money(text)
