"""Pages that leave the pool's memory and come back while the model runs: what step plans call exports and imports.

Three kinds (:class:`~abyssal.engine.messages.Transfer`).  *Stored* pages are read from the store into the pages' own
memory.  *Offloaded* ones are those of a preempted sequence: they go to the store's disk under keys that nobody else
can know, and come back; what the store did not take, or lost, is computed again.  *Remote* ones come from another
engine, layer by layer (:mod:`abyssal.engine.remote`).

Reading runs in threads beside the model's pass, over pages that nobody else uses until the scheduler hears that they
are there.  What a failed read leaves in a page does not matter: it is computed over before anything looks at it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from abyssal.cache.paged import PagedCache
from abyssal.cache.pages import PAGE
from abyssal.engine.live import LiveSequence
from abyssal.engine.messages import FinishedPrefix, Path, Transfer
from abyssal.engine.remote import RemoteFill, RemoteSource
from abyssal.engine.request import pages_for
from abyssal.engine.stored import StoredPages

logger = logging.getLogger(__name__)
_THREADS = 2
"""Transfers under way at a time; the store has threads of its own for the pages of one."""


@dataclass(frozen=True)
class Arrival:
    """An import that is over."""

    sequence: int
    num_tokens: int
    """That are in their pages; fewer than planned where some were not to be had."""
    path: Path
    """By which they were computed: "decode" if any was."""
    keeps_drafts: bool
    """Whether the sequence goes on where it stood: its drafts still hold."""


class PageMover:
    """Carries out the exports and imports of step plans.

    Args:
        live: the running sequences by number, as the engine keeps them.
        stored: None: there is no store.
        paths: of pages that may be another request's.
    """

    def __init__(
        self,
        cache: PagedCache,
        live: Mapping[int, LiveSequence],
        stored: StoredPages | None,
        paths: Collection[Path],
    ) -> None:
        self._cache = cache
        self._live = live
        self._stored = stored
        self._paths = paths
        self._offloaded: dict[int, list[bytes]] = {}
        self._remote: dict[int, RemoteSource] = {}
        self._fills: dict[int, RemoteFill] = {}
        self._under_way: dict[Future[tuple[int, Path]], tuple[Transfer, list[np.ndarray]]] = {}
        self._executor: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    @property
    def waiting(self) -> bool:
        """Whether imports are under way."""
        return bool(self._under_way)

    @property
    def filling(self) -> set[int]:
        """The sequences whose imports are under way."""
        return {transfer.sequence for transfer, _ in self._under_way.values()}

    def expect(self, sequence: int, source: RemoteSource) -> None:
        """Where the pages of a sequence come from that another engine has prefilled."""
        self._remote[sequence] = source

    def send(self, exports: Iterable[Transfer]) -> None:
        """Copy pages of preempted sequences out, before anybody writes to them."""
        for transfer in exports:
            seed = os.urandom(32)
            keys = [blake2b(seed, digest_size=32, key=b"%d" % index).digest() for index in range(len(transfer.pages))]
            taken = 0
            if self._stored is not None:
                buffers = [self._cache.page_buffer(page) for page in transfer.pages]
                taken = self._stored.put(keys, buffers, self._live[transfer.sequence].request.namespace)
            self._offloaded[transfer.sequence] = keys[:taken]

    def fetch(self, imports: Iterable[Transfer]) -> None:
        """Begin to fill pages, after whatever the same plan copies."""
        for transfer in imports:
            if transfer.kind == "remote":
                source = self._remote.pop(transfer.sequence)
                fill = RemoteFill(source, self._cache, transfer.pages, transfer.num_tokens)
                self._fills[transfer.sequence] = fill
                self._under_way[fill.future] = (transfer, [])
                continue
            buffers = [self._cache.page_buffer(page) for page in transfer.pages]
            self._under_way[self._threads().submit(self._job(transfer, buffers))] = (transfer, buffers)

    def arrivals(self, seconds: float = 0.0) -> list[Arrival]:
        """Imports that are over since the last call; waits up to ``seconds`` for the first."""
        if not self._under_way:
            return []
        for fill in self._fills.values():
            fill.give_up_if_stalled()
        done = wait(self._under_way, seconds, FIRST_COMPLETED).done
        return [self._arrival(future) for future in list(self._under_way) if future in done]

    def give_up(self, sequences: Collection[int]) -> None:
        """Wait no longer for what other engines send these sequences; it arrives as nothing."""
        for number in self._fills.keys() & sequences:
            self._fills[number].give_up("it is no longer wanted")

    def store(self, finished: Iterable[FinishedPrefix]) -> None:
        """Keep finished prefixes in the store."""
        if self._stored is not None:
            for each in finished:
                self._stored.write(each, self._cache.page_buffer)

    def forget(self, sequence: int) -> None:
        """A sequence has ended."""
        self._offloaded.pop(sequence, None)
        self._remote.pop(sequence, None)

    def forget_all(self) -> None:
        """Every sequence has ended, in the middle of whatever it was.  Waits for what is under way."""
        self.give_up(self.filling)
        wait(self._under_way)
        for books in (self._under_way, self._fills, self._offloaded, self._remote):
            books.clear()

    def close(self) -> None:
        """Wait for what is under way, and end the threads; another import begins new ones."""
        if self._executor is not None and self._process == os.getpid():
            self._executor.shutdown()
        self._executor = None

    def _threads(self) -> ThreadPoolExecutor:
        if self._executor is None or self._process != os.getpid():  # a fork has none of its parent's threads
            self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="page-mover")
            self._process = os.getpid()
        return self._executor

    def _job(self, transfer: Transfer, buffers: list[np.ndarray]) -> Callable[[], tuple[int, Path]]:
        """What a thread does for a transfer: fills leading pages, and says how many tokens and of which path."""
        live = self._live[transfer.sequence]
        stored, namespace = self._stored, live.request.namespace
        assert stored is not None
        if transfer.kind == "offload":
            keys = self._offloaded.pop(transfer.sequence, [])
            return lambda: (stored.get(keys, buffers[: len(keys)]) * PAGE, "prompt")
        tokens = tuple(live.tokens[: transfer.start + transfer.num_tokens])

        def read() -> tuple[int, Path]:
            count, path = stored.read(tokens, namespace, self._paths, transfer.start, buffers)
            return count * PAGE, path

        return read

    def _arrival(self, future: Future[tuple[int, Path]]) -> Arrival:
        transfer, buffers = self._under_way.pop(future)
        self._fills.pop(transfer.sequence, None)
        num_tokens = 0
        path: Path = "prompt"
        try:
            num_tokens, path = future.result()
        except Exception as error:  # computing them instead costs time alone
            logger.warning("pages of another engine did not arrive, and are computed here: %s", error)
        num_tokens = min(num_tokens, transfer.num_tokens)
        for page, buffer in zip(transfer.pages[: pages_for(num_tokens)], buffers, strict=False):
            self._cache.put_buffer(page, buffer)
        keeps_drafts = transfer.kind != "stored" and num_tokens == transfer.num_tokens
        return Arrival(transfer.sequence, num_tokens, path, keeps_drafts)
