"""How much a key may ask for: requests and tokens a minute, and requests at a time.

Token buckets: a bucket holds a minute's worth, fills evenly, and a request that finds too little is told when to come
back.  How many tokens an answer will have is not known before, so tokens are taken as they become known and may leave
the bucket in debt: over time nobody gets more than the rate, and a burst goes over it by no more than the requests that
were let in while there was something left.

Counts live in memory, for each process its own: a restart forgets them, which costs an operator a minute's worth.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from abyssal.serve.accounts.keys import Account, KeyLimits
from abyssal.serve.accounts.refusal import too_many

_MINUTE = 60.0


class TokenBucket:
    """Holds up to ``capacity``, and fills from empty in ``seconds``; it starts full."""

    def __init__(self, capacity: float, seconds: float, now: float) -> None:
        assert capacity > 0 and seconds > 0, (capacity, seconds)
        self.capacity = capacity
        self._rate = capacity / seconds
        self._level = float(capacity)
        self._at = now

    def level(self, now: float) -> float:
        """What it holds; below zero it is in debt."""
        self._level = min(self.capacity, self._level + max(0.0, now - self._at) * self._rate)
        self._at = max(self._at, now)
        return self._level

    def wait(self, amount: float, now: float) -> float:
        """Seconds until it holds ``amount`` (or all that it can hold); 0 if it does."""
        missing = min(amount, self.capacity) - self.level(now)
        return max(0.0, missing) / self._rate

    def take(self, amount: float, now: float) -> None:
        """Even if it holds less."""
        self._level = self.level(now) - amount


class _Use:
    """What a key is using."""

    def __init__(self, limits: KeyLimits, now: float) -> None:
        self.running = 0
        self.set_limits(limits, now)

    def set_limits(self, limits: KeyLimits, now: float) -> None:
        self.limits = limits
        self.requests = _bucket(limits.requests_per_minute, now)
        self.tokens = _bucket(limits.tokens_per_minute, now)


class Limiter:
    """The limits of all keys.

    Args:
        clock: seconds, which never run backwards.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._uses: dict[int, _Use] = {}
        self._lock = threading.Lock()

    def enter(self, account: Account) -> None:
        """One more request of the key, until :meth:`leave`.  A refused one counts for nothing.

        Raises:
            Refusal: 429, with the seconds to wait.
        """
        with self._lock:
            now = self._clock()
            use = self._uses.get(account.key_id)
            if use is None:
                use = self._uses[account.key_id] = _Use(account.limits, now)
            elif use.limits != account.limits:
                use.set_limits(account.limits, now)
            _check(use, now)
            if use.requests is not None:
                use.requests.take(1, now)
            use.running += 1

    def count_tokens(self, account: Account, tokens: int) -> None:
        """Of a prompt when it is known, of an answer when it is done; below zero gives some back."""
        with self._lock:
            use = self._uses.get(account.key_id)
            if use is not None and use.tokens is not None:
                use.tokens.take(tokens, self._clock())

    def leave(self, account: Account) -> None:
        with self._lock:
            use = self._uses[account.key_id]
            use.running -= 1
            assert use.running >= 0, account.key_name

    def running(self, account: Account) -> int:
        with self._lock:
            use = self._uses.get(account.key_id)
            return 0 if use is None else use.running


def _bucket(capacity: int | None, now: float) -> TokenBucket | None:
    return None if capacity is None else TokenBucket(capacity, _MINUTE, now)


def _check(use: _Use, now: float) -> None:
    limits = use.limits
    if limits.concurrency is not None and use.running >= limits.concurrency:
        # Nobody knows when one of them will be done.
        raise too_many(f"This API key may run {limits.concurrency} requests at a time.", 1)
    if use.requests is not None and (seconds := use.requests.wait(1, now)) > 0:
        raise too_many(f"This API key may send {limits.requests_per_minute} requests a minute.", seconds)
    if use.tokens is not None and (seconds := use.tokens.wait(1, now)) > 0:
        raise too_many(f"This API key may use {limits.tokens_per_minute} tokens a minute.", seconds)
