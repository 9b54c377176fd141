"""Pages on their way from another engine: a thread for each, which may be left behind.

Nobody knows how long a network takes, so a source that hangs must hold up neither other transfers nor the end of its
request, nor of the process.  Whoever gives up gets the pages back at once: a layer that comes later is not written.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from torch import Tensor

from abyssal.cache.paged import PagedCache
from abyssal.engine.messages import Path

STALLED_SECONDS = 20.0
"""After so long without a layer the pages are computed here instead."""


class LayerWriter(Protocol):
    def __call__(self, layer: int, entries: Tensor, /) -> None:
        """Write a layer's entries into the pages.  Raises ``TimeoutError`` where nobody waits for them any more."""
        ...


class RemoteSource(Protocol):
    """Pages of another engine."""

    def fill(self, write: LayerWriter) -> Path:
        """Write their layers, and say by which path they were computed.  May raise anything, and take its time."""
        ...


class RemoteFill:
    """A source that is filling pages.

    Attributes:
        future: ``num_tokens`` and the path when all layers are there; fails with what went wrong, or when it is given
            up.
    """

    def __init__(self, source: RemoteSource, cache: PagedCache, pages: Sequence[int], num_tokens: int) -> None:
        self.future: Future[tuple[int, Path]] = Future()
        self._cache, self._pages = cache, pages
        self._lock = threading.Lock()
        self._heard = time.monotonic()
        # A daemon: the process may end though the source hangs.
        threading.Thread(target=self._run, args=(source, num_tokens), name="remote-pages", daemon=True).start()

    def give_up_if_stalled(self) -> None:
        silent = time.monotonic() - self._heard
        if silent > STALLED_SECONDS:
            self.give_up(f"nothing came for {silent:.0f} s")

    def give_up(self, why: str) -> None:
        """Nothing is written to the pages from here on."""
        self._end(TimeoutError(why))

    def _run(self, source: RemoteSource, num_tokens: int) -> None:
        try:
            result = num_tokens, source.fill(self._write)
        except BaseException as error:  # it is the source's, and the future tells of it
            self._end(error)
        else:
            self._end(result)

    def _write(self, layer: int, entries: Tensor, /) -> None:
        with self._lock:
            if self.future.done():
                raise TimeoutError("the pages are wanted no longer")
            self._cache.import_layer(self._pages, layer, entries)
            self._heard = time.monotonic()

    def _end(self, outcome: tuple[int, Path] | BaseException) -> None:
        """The first outcome stands."""
        with self._lock:
            if self.future.done():
                return
            if isinstance(outcome, BaseException):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)
