"""What tokens cost: a TOML file with prices a 1M tokens by model, and hours at which they cost less.

    currency = "USD"

    [models."deepseek-v3"]
    hit = 0.07          # of the prompt, found in the context cache
    miss = 0.27         # of the prompt, computed
    output = 1.10       # of the answer, its reasoning included

    [[models."deepseek-v3".off_peak]]
    from = "16:30"      # included
    to = "00:30"        # not included; may lie on the next day
    zone = "UTC"        # an IANA time zone; its summer time is observed
    discount = 50       # percent, of all three

A name that ends in ``*`` is for all models that begin so; an exact name comes first, then the longest beginning.  A
request costs what its hour costs when it is done.  Its cost is rounded once, to the nearest billionth (a half up).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from abyssal.serve.accounts.money import NANO, parse_money

_MILLION = 1_000_000
_WHOLE = 10_000
"""Discounts are in parts of this: hundredths of a percent."""
_MOST_A_MILLION = 10_000 * NANO
"""A price above is a mistake, and what it costs might not fit into 64 bits."""


@dataclass(frozen=True)
class OffPeak:
    """Hours of the day at which all prices are lower."""

    begin: time
    end: time
    zone: ZoneInfo
    discount: int
    """In hundredths of a percent."""

    def covers(self, moment: datetime) -> bool:
        local = moment.astimezone(self.zone).time()
        if self.begin < self.end:
            return self.begin <= local < self.end
        return local >= self.begin or local < self.end


@dataclass(frozen=True)
class Price:
    """Of one model, in billionths a 1M tokens."""

    hit: int
    miss: int
    output: int
    off_peak: tuple[OffPeak, ...] = ()
    """Where two overlap, the larger discount holds."""

    def cost(self, hit_tokens: int, miss_tokens: int, output_tokens: int, at: float) -> int:
        """Billionths, for a request that is done at ``at`` (seconds since the epoch)."""
        moment = datetime.fromtimestamp(at, UTC)
        discount = max((hours.discount for hours in self.off_peak if hours.covers(moment)), default=0)
        return self._charge(hit_tokens, miss_tokens, output_tokens, _WHOLE - discount)

    def most(self, prompt_tokens: int, output_tokens: int) -> int:
        """Billionths that a request of so many tokens costs at most: whatever is cached, and at any hour."""
        dearer = max(self.hit, self.miss)
        return -(-(prompt_tokens * dearer + output_tokens * self.output) // _MILLION)

    def saved(self, hit_tokens: int, at: float) -> int:
        """Billionths that the cache's hits saved a request."""
        return self.cost(0, hit_tokens, 0, at) - self.cost(hit_tokens, 0, 0, at)

    def _charge(self, hit_tokens: int, miss_tokens: int, output_tokens: int, share: int) -> int:
        full = hit_tokens * self.hit + miss_tokens * self.miss + output_tokens * self.output
        return (2 * full * share + _MILLION * _WHOLE) // (2 * _MILLION * _WHOLE)


FREE = Price(0, 0, 0)


@dataclass(frozen=True)
class PriceTable:
    """Prices by model."""

    currency: str = "USD"
    models: Mapping[str, Price] = field(default_factory=lambda: {"*": FREE})

    def price(self, model: str) -> Price:
        """Of ``model``.

        Raises:
            ValueError: the table has none.  Ask at the start for every model that is served.
        """
        beginnings = [name for name in self.models if name.endswith("*") and model.startswith(name[:-1])]
        name = model if model in self.models else max(beginnings, key=len, default=None)
        if name is None:
            raise ValueError(f"the price table has no model {model!r}: add [models.{model!r}] or [models.'*']")
        return self.models[name]


def read_prices(path: Path) -> PriceTable:
    """The table in the file ``path``.

    Raises:
        ValueError: what is wrong with it, and where.
        OSError: it cannot be read.
    """
    try:
        table = tomllib.loads(path.read_bytes().decode(), parse_float=Decimal)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: is not TOML: {error}") from None
    try:
        return _table(table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _table(table: dict[str, Any]) -> PriceTable:
    _only(table, {"currency", "models"}, "the file")
    currency = table.get("currency", "USD")
    if not isinstance(currency, str) or not re.fullmatch("[A-Z]{3}", currency):
        raise ValueError(f"currency is {currency!r}: write a code of three capital letters, such as USD")
    models = table.get("models")
    if not isinstance(models, dict) or not models:
        raise ValueError("models is missing: write [models.NAME] with hit, miss and output")
    return PriceTable(currency, {name: _price(entry, f"models.{name}") for name, entry in models.items()})


def _price(entry: Any, where: str) -> Price:
    _only(entry, {"hit", "miss", "output", "off_peak"}, where)
    off_peak = entry.get("off_peak", [])
    if not isinstance(off_peak, list):
        raise ValueError(f"{where}.off_peak: write it as [[{where}.off_peak]]")
    hit, miss, output = (_amount(entry, name, where) for name in ("hit", "miss", "output"))
    return Price(hit, miss, output, tuple(_hours(hours, f"{where}.off_peak") for hours in off_peak))


def _amount(entry: dict[str, Any], name: str, where: str) -> int:
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise ValueError(f"{where}.{name} is {value!r}: write a price a 1M tokens, such as 0.27")
    try:
        amount = parse_money(value)
    except ValueError as error:
        raise ValueError(f"{where}.{name}: {error}") from None
    if not 0 <= amount <= _MOST_A_MILLION:
        raise ValueError(f"{where}.{name} is {value}: a price lies between 0 and {_MOST_A_MILLION // NANO}")
    return amount


def _hours(entry: Any, where: str) -> OffPeak:
    _only(entry, {"from", "to", "zone", "discount"}, where)
    begin, end = (_time(entry.get(name), f"{where}.{name}") for name in ("from", "to"))
    if begin == end:
        raise ValueError(f"{where}: from and to are the same; for the whole day lower the prices")
    zone = entry.get("zone", "UTC")
    try:
        info = ZoneInfo(zone)
    except Exception:  # zoneinfo raises half a dozen kinds, by how wrong the name is
        raise ValueError(f"{where}.zone is {zone!r}: write an IANA time zone that this machine knows") from None
    return OffPeak(begin, end, info, _discount(entry.get("discount"), f"{where}.discount"))


def _discount(value: Any, where: str) -> int:
    number = isinstance(value, int | Decimal) and not isinstance(value, bool)
    if not number or not Decimal(value).is_finite() or not 0 < value <= 100 or value * 100 % 1:
        raise ValueError(f"{where} is {value}: write percent, above 0 and up to 100, with at most two decimals")
    return int(value * 100)


def _time(value: Any, where: str) -> time:
    if isinstance(value, time):
        return value
    if isinstance(value, str) and re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", value):
        return time.fromisoformat(value)
    raise ValueError(f'{where} is {value!r}: write a time of day, such as "16:30"')


def _only(entry: Any, names: set[str], where: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {entry!r}: write a table")
    unknown = sorted(set(entry) - names)
    if unknown:
        raise ValueError(f"{where} knows no {unknown[0]!r}: only {', '.join(sorted(names))}")
