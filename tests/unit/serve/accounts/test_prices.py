"""Prices: tables, hours, and rounding."""

from __future__ import annotations

from datetime import datetime
from fractions import Fraction
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abyssal.serve.accounts.prices import FREE, OffPeak, Price, PriceTable, read_prices

TABLE = """
currency = "USD"
[models."deepseek-v3"]
hit = 0.07
miss = 0.27
output = 1.10
[[models."deepseek-v3".off_peak]]
from = "16:30"
to = "00:30"
discount = 50
[models."deepseek-*"]
hit = "{odd}"
miss = 1
output = 2
"""
tokens = st.integers(0, 2**31 - 1)
amounts = st.integers(0, 10**13)


def table(tmp_path: Path, text: str) -> PriceTable:
    (tmp_path / "prices.toml").write_text(text)
    return read_prices(tmp_path / "prices.toml")


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def test_a_million_tokens_cost_their_price(tmp_path: Path) -> None:
    price = table(tmp_path, TABLE.replace('"{odd}"', "0.028")).price("deepseek-v3")
    noon = at("2025-03-01T12:00Z")
    million = 1_000_000
    assert [price.cost(*counts, noon) for counts in ((million, 0, 0), (0, million, 0), (0, 0, million))] == [
        70_000_000,
        270_000_000,
        1_100_000_000,
    ]
    assert price.cost(64, 36, 10, noon) == 64 * 70 + 36 * 270 + 10 * 1100
    assert price.saved(64, noon) == 64 * 200


@pytest.mark.parametrize(
    ("moment", "cost"),
    [
        ("2025-03-01T16:29:59Z", 270),
        ("2025-03-01T16:30Z", 135),
        ("2025-03-01T23:59:59Z", 135),
        ("2025-03-02T00:29:59Z", 135),
        ("2025-03-02T00:30Z", 270),
        ("2025-03-02T04:00+08:00", 135),
    ],
)
def test_off_peak_hours_over_midnight(tmp_path: Path, moment: str, cost: int) -> None:
    price = table(tmp_path, TABLE.replace('"{odd}"', "0.028")).price("deepseek-v3")
    assert price.cost(0, 1, 0, at(moment)) == cost


def test_hours_follow_summer_time_and_overlap() -> None:
    def hours(begin: int, end: int, discount: int) -> OffPeak:
        clock = datetime(2025, 1, 1)
        return OffPeak(
            clock.replace(hour=begin).time(), clock.replace(hour=end).time(), ZoneInfo("Europe/Berlin"), discount
        )

    price = Price(100, 100, 100, (hours(1, 6, 2500), hours(2, 4, 7500)))
    million = 1_000_000
    costs = {
        "2025-01-15T00:30Z": 75,  # 01:30 in winter
        "2025-01-15T01:30Z": 25,
        "2025-07-15T00:30Z": 25,  # 02:30 in summer
        "2025-07-15T03:59Z": 75,
        "2025-07-15T04:00Z": 100,
    }
    assert {moment: price.cost(0, million, 0, at(moment)) for moment in costs} == costs


@given(tokens, tokens, tokens, amounts, amounts, amounts, st.integers(0, 10_000))
def test_cost_is_the_exact_one_rounded_once(
    hit: int, miss: int, output: int, hit_price: int, miss_price: int, output_price: int, discount: int
) -> None:
    noon, midnight = datetime(2025, 1, 1, 12).time(), datetime(2025, 1, 1).time()
    price = Price(hit_price, miss_price, output_price, (OffPeak(midnight, noon, ZoneInfo("UTC"), discount),))
    exact = Fraction(hit * hit_price + miss * miss_price + output * output_price, 1_000_000)
    for moment, share in (("2025-01-01T06:00Z", Fraction(10_000 - discount, 10_000)), ("2025-01-01T18:00Z", 1)):
        cost = price.cost(hit, miss, output, at(moment))
        assert -Fraction(1, 2) < cost - exact * share <= Fraction(1, 2)
        assert 0 <= cost <= price.most(hit + miss, output)
        assert cost < 2**62


def test_names(tmp_path: Path) -> None:
    prices = table(tmp_path, TABLE.replace('"{odd}"', "0.028"))
    assert prices.price("deepseek-v3").hit == 70_000_000
    assert prices.price("deepseek-r1").hit == 28_000_000
    with pytest.raises(ValueError, match="no model 'gpt'"):
        prices.price("gpt")
    assert PriceTable().price("anything") == FREE
    longest = PriceTable(models={"*": FREE, "a*": Price(1, 1, 1), "ab*": Price(2, 2, 2)})
    assert [longest.price(name).hit for name in ("abc", "ac", "b")] == [2, 1, 0]


MODEL = "[models.m]\nhit = 1\nmiss = 1\noutput = 1\n"
HOURS = MODEL + '[[models.m.off_peak]]\nfrom = "01:00"\nto = "02:00"\ndiscount = 50\n'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x", "is not TOML"),
        ("", "models is missing"),
        ("models = 3", "models is missing"),
        ("currency = 'dollars'\n" + MODEL, "currency is 'dollars'"),
        ("colour = 1\n" + MODEL, "knows no 'colour'"),
        (MODEL + "prise = 1", "models.m knows no 'prise'"),
        (MODEL.replace("hit = 1", "hit = -1"), "models.m.hit"),
        (MODEL.replace("hit = 1", "hit = nan"), "models.m.hit: 'NaN'"),
        (MODEL.replace("hit = 1", "hit = true"), "models.m.hit"),
        (MODEL.replace("hit = 1", "hit = '1'"), "models.m.hit"),
        (MODEL.replace("hit = 1", "hit = 10001"), "between 0 and 10000"),
        (MODEL.replace("hit = 1", "hit = 0.0000000001"), "models.m.hit: .* finer"),
        (MODEL.replace("hit = 1\n", ""), "models.m.hit is None"),
        ("[models]\nm = 3", "models.m is 3"),
        (MODEL + "off_peak = 3", "off_peak"),
        (HOURS.replace("02:00", "01:00"), "the same"),
        (HOURS.replace("02:00", "25:00"), "models.m.off_peak.to"),
        (HOURS.replace("= 50", "= 0"), "discount is 0"),
        (HOURS.replace("= 50", "= 101"), "discount is 101"),
        (HOURS.replace("= 50", "= 0.001"), "discount"),
        (HOURS.replace("= 50", "= nan"), "discount"),
        (HOURS.replace("discount = 50", ""), "discount is None"),
        (HOURS + "zone = 'Mars/Olympus'", "zone is 'Mars/Olympus'"),
        (HOURS + "zone = '../etc/passwd'", "zone"),
        (HOURS + "zone = 3", "zone is 3"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        table(tmp_path, text)
    assert "prices.toml: " in str(caught.value)
