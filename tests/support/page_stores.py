"""Stores of pages that behave, fail, lie or take their time."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from abyssal.cache.key import PageSpace

SPACE = PageSpace(weights="random", dtype="float32", tokenizer="", layout="")


class MemoryStore:
    """Pages in a dictionary."""

    def __init__(self) -> None:
        self.pages: dict[bytes, bytes] = {}
        self.namespaces: list[str] = []
        self.num_read = 0
        self.closed = False

    def lookup(self, keys: Sequence[bytes]) -> int:
        return next((count for count, key in enumerate(keys) if key not in self.pages), len(keys))

    def read(self, keys: Sequence[bytes], buffers: Sequence[Any]) -> int:
        for count, (key, buffer) in enumerate(zip(keys, buffers, strict=True)):
            if key not in self.pages:
                return count
            memoryview(buffer)[:] = self.pages[key]
            self.num_read += 1
        return len(keys)

    def write(self, keys: Sequence[bytes], buffers: Sequence[Any], namespace: str = "") -> int:
        for key, buffer in zip(keys, buffers, strict=True):
            self.pages[key] = bytes(buffer)
            self.namespaces.append(namespace)
        return len(keys)

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True


class RaisingStore(MemoryStore):
    """Raises at random, or in the methods named."""

    def __init__(self, *methods: str, seed: int = 0) -> None:
        super().__init__()
        self._methods, self._random = methods, random.Random(seed)

    def _may_raise(self, method: str) -> None:
        if method in self._methods or (not self._methods and self._random.random() < 0.3):
            raise ConnectionError("the store is gone")

    def lookup(self, keys: Sequence[bytes]) -> int:
        self._may_raise("lookup")
        return super().lookup(keys)

    def read(self, keys: Sequence[bytes], buffers: Sequence[Any]) -> int:
        self._may_raise("read")
        return super().read(keys, buffers)

    def write(self, keys: Sequence[bytes], buffers: Sequence[Any], namespace: str = "") -> int:
        self._may_raise("write")
        return super().write(keys, buffers, namespace)

    def close(self) -> None:
        self._may_raise("close")


class LyingStore(MemoryStore):
    """Promises pages that it has not, leaves nonsense in buffers it does not vouch for, takes what it loses."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._random = random.Random(seed)

    def lookup(self, keys: Sequence[bytes]) -> int:
        answers: list[Any] = [len(keys), len(keys) + 3, super().lookup(keys), None]
        return self._random.choice(answers)

    def read(self, keys: Sequence[bytes], buffers: Sequence[Any]) -> int:
        good = min(super().read(keys, buffers), self._random.randrange(len(keys) + 1))
        for buffer in buffers[good:]:
            np.asarray(buffer)[:] = 0xFF  # as floating-point numbers, none
        return good

    def write(self, keys: Sequence[bytes], buffers: Sequence[Any], namespace: str = "") -> int:
        super().write(keys, buffers, namespace)
        for key in keys:
            if self._random.random() < 0.3:
                del self.pages[key]
        answers: list[Any] = [len(keys), len(keys) + 2, 0, -1, None]
        return self._random.choice(answers)


class SlowStore(MemoryStore):
    """Reads take ``seconds``."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def read(self, keys: Sequence[bytes], buffers: Sequence[Any]) -> int:
        time.sleep(self.seconds)
        return super().read(keys, buffers)
