"""Rates and concurrency."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abyssal.serve.accounts import limits
from abyssal.serve.accounts.keys import Account, KeyLimits
from abyssal.serve.accounts.limits import Limiter, TokenBucket
from abyssal.serve.accounts.refusal import Refusal


def account(key_id: int = 1, **most: int) -> Account:
    return Account(key_id, "k", 1, "a", "n", KeyLimits(**most), False, False, None, 0.0, "hint", 0)


def refused(limiter: Limiter, who: Account) -> int:
    with pytest.raises(Refusal) as caught:
        limiter.enter(who)
    assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
    assert caught.value.retry_after is not None
    return caught.value.retry_after


@given(
    st.integers(1, 50),
    st.lists(st.tuples(st.floats(-1, 20), st.integers(1, 10)), max_size=60),
)
def test_a_bucket_never_gives_more_than_it_holds_and_gets(capacity: int, asks: list[tuple[float, int]]) -> None:
    """In no stretch of time more than the capacity and what flowed in, and never above the brim."""
    bucket = TokenBucket(capacity, 60.0, now=0.0)
    now, latest, given_out = 0.0, 0.0, list[tuple[float, int]]()
    for pause, amount in asks:
        now += pause  # a clock that runs backwards gives nothing
        latest = max(latest, now)
        wait = bucket.wait(amount, now)
        assert bucket.level(now) <= capacity
        if amount <= capacity and wait == 0.0:
            bucket.take(amount, now)
            given_out.append((latest, amount))
        for start in {at for at, _ in given_out}:
            given_since = sum(amount for at, amount in given_out if at >= start)
            assert given_since <= capacity * (1 + (latest - start) / 60.0) + 1e-6


@given(st.integers(1, 50), st.integers(1, 200), st.integers(1, 50))
def test_after_the_wait_it_is_there(capacity: int, debt: int, amount: int) -> None:
    bucket = TokenBucket(capacity, 60.0, now=0.0)
    bucket.take(debt, 0.0)
    wait = bucket.wait(amount, 0.0)
    assert bucket.wait(amount, wait + 1e-6) == 0.0
    early = TokenBucket(capacity, 60.0, now=0.0)
    early.take(debt, 0.0)
    assert wait == 0.0 or early.wait(amount, wait * 0.99) > 0.0


def test_requests_a_minute(clock) -> None:
    limiter, who = Limiter(clock), account(requests_per_minute=6)
    for _ in range(6):
        limiter.enter(who)
    assert refused(limiter, who) == 10
    clock.now += 9.5
    assert refused(limiter, who) == 1  # half a second, rounded up
    clock.now += 1
    limiter.enter(who)
    assert refused(limiter, who) == 10
    assert limiter.running(who) == 7, "one that was refused does not run"
    limiter.enter(account(2, requests_per_minute=6))


def test_tokens_a_minute(clock) -> None:
    limiter, who = Limiter(clock), account(tokens_per_minute=600)
    limiter.enter(who)
    limiter.count_tokens(who, 599)
    limiter.enter(who)
    limiter.count_tokens(who, 301)  # an answer may leave the bucket in debt
    assert refused(limiter, who) == 31
    clock.now += 29
    limiter.count_tokens(who, -20)  # less than was expected
    limiter.enter(who)


def test_requests_at_a_time(clock) -> None:
    limiter, who = Limiter(clock), account(concurrency=2, requests_per_minute=3)
    limiter.enter(who)
    limiter.enter(who)
    assert refused(limiter, who) == 1
    limiter.leave(who)
    limiter.enter(who)  # what was refused did not count against the rate
    limiter.leave(who)
    assert refused(limiter, who) == 20
    with pytest.raises(AssertionError):
        for _ in range(3):
            limiter.leave(who)


def test_new_limits_hold_at_once_and_what_runs_still_counts(clock) -> None:
    limiter = Limiter(clock)
    limiter.enter(account(concurrency=2))
    limiter.enter(account(concurrency=2))
    refused(limiter, account(concurrency=1))
    limiter.enter(account(concurrency=3))
    assert limiter.running(account()) == 3


def test_threads_share_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limiter, who, ready = Limiter(), account(concurrency=5), threading.Barrier(16)
    check = limits._check

    def check_and_dawdle(*arguments: Any) -> None:
        check(*arguments)
        time.sleep(0.002)  # time enough for others to look as well, if they could

    monkeypatch.setattr(limits, "_check", check_and_dawdle)

    def enter(_: int) -> bool:
        ready.wait()
        try:
            limiter.enter(who)
        except Refusal:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(enter, range(16))) == 5
