"""Pages that outlive the engine: a store of pages behind the scheduler's lookup and the runner's imports.

A :class:`~abyssal.cache.store.PageStore` knows keys and bytes; this knows tokens, paths and namespaces.  A page that
was computed on the prompt path, it and all before it, is stored under a key of that path, every other one under a key
of the decode path, so that an engine in deterministic mode, which asks for the prompt path alone, finds only what
prefill computes.

A store is a help and never a condition: while it opens, while the digest of a model's files is being computed, when it
fails, loses pages, promises more than it has or raises, requests go on as if it were empty.

Nothing is fetched that would sooner be computed: both rates are measured on the way (:class:`FetchRates`).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from abyssal.cache.key import PageSpace, Stopped
from abyssal.cache.pages import PAGE
from abyssal.cache.store import PageBuffer, PageStore
from abyssal.engine.messages import FinishedPrefix, Path

logger = logging.getLogger(__name__)

OPENING_SECONDS = 0.5
"""So long after the store began to open, a request waits for it; later ones take it as empty until it is open."""
_KNOWN_KEYS = 1 << 16
_MEASURED_READS = 16
_RETRY = 16

MakeSpace = Callable[[Callable[[], bool]], PageSpace]
"""Finds out in which space pages are; is handed a function that says whether to give up."""

_T = TypeVar("_T")


class StoredPages:
    """A store as one engine uses it.  Its methods may be called from any thread, and none raises.

    Args:
        store: or what opens it, in the background; once in every process that a fork makes.
        space: of the model's pages, their layout left to :meth:`bind`; or what finds it out, in the background.
    """

    def __init__(self, store: PageStore | Callable[[], PageStore], space: PageSpace | MakeSpace) -> None:
        self._make_store, self._make_space = store, space
        self._layout = ""
        self._changed_weights = ""
        self._inherited: list[_Opened] = []
        self._told = False
        self._closed = False
        self._begin()

    def bind(self, layout: str) -> None:
        """How the engine's pages are arranged, as far as ``space`` does not say; before anything else."""
        self._layout = layout

    def wait(self, seconds: float) -> bool:
        """Wait for the store to be open and the space to be known; whether they are."""
        opened = self._here()
        opened.ready.wait(seconds)
        return opened.store is not None and opened.space is not None

    def change_weights(self, version: object) -> None:
        """The model computes other pages from here on.  Where its weights come from is not known, and another engine
        may count its versions alike, so that nobody shares the new space."""
        self._changed_weights = f"{os.urandom(16).hex()} {version}"

    # What the scheduler asks.

    def lookup(self, tokens: Sequence[int], namespace: bytes, paths: Collection[Path]) -> int:
        """Leading tokens, a multiple of the page size, that the store has; 0 where fetching does not pay."""
        opened = self._here()
        opened.ready.wait(max(0.0, opened.begun + OPENING_SECONDS - time.monotonic()))
        store = opened.store
        if store is None or not self._rates.pay():
            return 0
        found = 0
        for path in _in_order(paths):
            keys = self._keys(tokens, namespace.decode(), path)[found:]
            more = _within(self._guarded(store.lookup, 0, keys), len(keys))
            self._known.add(keys[:more])
            self._known.discard(keys[more:])
            found += more
        return found * PAGE

    # What the engine does.

    def read(
        self, tokens: Sequence[int], namespace: str, paths: Collection[Path], start: int, buffers: Sequence[PageBuffer]
    ) -> tuple[int, Path]:
        """Fill the buffers with the pages of ``tokens`` from position ``start`` on.

        Returns:
            How many leading ones are right (the others hold anything), and "decode" if any of those was computed so.
        """
        store, first = self._here().store, start // PAGE
        if store is None:
            return 0, "prompt"
        found = 0
        path_found: Path = "prompt"
        begun = time.perf_counter()
        for path in _in_order(paths):
            keys = self._keys(tokens, namespace, path)[first + found : first + len(buffers)]
            more = _within(self._guarded(store.read, 0, keys, buffers[found:]), len(keys)) if keys else 0
            self._known.discard(keys[more:])
            found += more
            path_found = path if more else path_found
        self._rates.note_read(found * PAGE, time.perf_counter() - begun)
        return found, path_found

    def write(self, finished: FinishedPrefix, buffer_of: Callable[[int], PageBuffer]) -> None:
        """Store finished pages in the background, those left out that are known to be there.

        Args:
            buffer_of: the bytes of a page by its number; copied before this returns.
        """
        store = self._here().store
        if store is None:
            return
        of_prompt = finished.num_prompt_path // PAGE
        keys = self._keys(finished.tokens, finished.namespace, "prompt")[:of_prompt]
        if of_prompt < len(finished.pages):
            keys += self._keys(finished.tokens, finished.namespace, "decode")[of_prompt:]
        new = [(key, page) for key, page in zip(keys, finished.pages, strict=False) if key not in self._known]
        if not new:
            return
        new_keys = [key for key, _ in new]
        taken = self._guarded(store.write, 0, new_keys, [buffer_of(page) for _, page in new], finished.namespace)
        self._known.add(new_keys[: _within(taken, len(new))])

    def put(self, keys: Sequence[bytes], buffers: Sequence[PageBuffer], namespace: str) -> int:
        """Store pages under keys of the caller's own; how many leading ones were taken."""
        store = self._here().store
        return 0 if store is None else _within(self._guarded(store.write, 0, keys, buffers, namespace), len(keys))

    def get(self, keys: Sequence[bytes], buffers: Sequence[PageBuffer]) -> int:
        """The reverse of :meth:`put`: how many leading pages are right."""
        store = self._here().store
        return 0 if store is None else _within(self._guarded(store.read, 0, keys, buffers), len(keys))

    def note_computed(self, num_tokens: int, seconds: float) -> None:
        """Prompt tokens that the model has computed, for the comparison with fetching."""
        self._rates.note_computed(num_tokens, seconds)

    def flush(self) -> None:
        """Return when everything taken is written, or given up."""
        store = self._here().store
        if store is not None:
            self._guarded(store.flush, None)

    def close(self) -> None:
        """Write what was taken, and let go of files and threads; afterwards nothing is found and nothing taken."""
        opened = self._here()
        self._closed = True
        if (store := opened.close()) is not None:
            self._guarded(store.close, None)

    def _here(self) -> _Opened:
        """The store as this process has it: files, threads and locks do not survive a fork."""
        if self._opened.process != os.getpid() and not self._closed:
            self._inherited.append(self._opened)  # to close it is the parent's business
            self._begin()
        return self._opened

    def _begin(self) -> None:
        self._rates = FetchRates()
        self._known = _KnownKeys(_KNOWN_KEYS)
        self._opened = _Opened(self._make_store, self._make_space)

    def _keys(self, tokens: Sequence[int], namespace: str, path: Path) -> list[bytes]:
        space = self._here().space
        if space is None:
            return []
        layout, weights = f"{space.layout} {self._layout}", f"{space.weights} {self._changed_weights}"
        return replace(space, layout=layout, weights=weights).keys(tokens, path, namespace)

    def _guarded(self, call: Callable[..., _T], otherwise: _T, *arguments: object) -> _T:
        """What the store answers; ``otherwise``, and the first time a warning, where it raises."""
        try:
            return call(*arguments)
        except Exception:
            if not self._told:
                self._told = True
                logger.warning("the store of pages fails, and pages are computed instead", exc_info=True)
            return otherwise


class _Opened:
    """A store and its space in one process, opened by a thread unless they are given."""

    def __init__(self, store: PageStore | Callable[[], PageStore], space: PageSpace | MakeSpace) -> None:
        self.process = os.getpid()
        self.begun = time.monotonic()
        self.ready = threading.Event()
        self.store: PageStore | None = None
        self.space: PageSpace | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = None
        if callable(store) or callable(space):
            self._thread = threading.Thread(
                target=self._open, args=(store, space), name="page-store-opener", daemon=True
            )
            self._thread.start()
        else:
            self.store, self.space = store, space
            self.ready.set()

    def close(self) -> PageStore | None:
        """Give up what is under way; the store, for the caller to close."""
        self._stop.set()
        if self._thread is not None and self.process == os.getpid():
            self._thread.join()
        store, self.store = self.store, None
        return store

    def _open(self, store: PageStore | Callable[[], PageStore], space: PageSpace | MakeSpace) -> None:
        try:
            self.store = store() if callable(store) else store
            self.space = space(self._stop.is_set) if callable(space) else space
        except Stopped:
            pass
        except Exception as error:  # nothing here may take a request with it
            logger.warning("pages are not kept beyond this process: %s", error)
        finally:
            self.ready.set()


class FetchRates:
    """Whether fetching a token's entries is faster than computing them: decaying averages of what was measured.

    A store that is slower than the model (a network file system under load, a fast accelerator) would only delay
    requests.  It is tried again now and then.
    """

    def __init__(self, decay: float = 0.9) -> None:
        self._decay = decay
        self._lock = threading.Lock()
        self._read = (0.0, 0.0)
        self._computed = (0.0, 0.0)
        self._num_reads = 0
        self._num_refused = 0

    def note_read(self, num_tokens: int, seconds: float) -> None:
        with self._lock:
            self._read = self._mixed(self._read, num_tokens, seconds)
            self._num_reads += 1

    def note_computed(self, num_tokens: int, seconds: float) -> None:
        with self._lock:
            self._computed = self._mixed(self._computed, num_tokens, seconds)

    def pay(self) -> bool:
        """Whether the next read is worth its while; yes until both are known."""
        with self._lock:
            (read, reading), (computed, computing) = self._read, self._computed
            if self._num_reads < _MEASURED_READS or not computed or read * computing >= computed * reading:
                return True
            self._num_refused += 1
            return self._num_refused % _RETRY == 0

    def _mixed(self, average: tuple[float, float], num_tokens: int, seconds: float) -> tuple[float, float]:
        return average[0] * self._decay + num_tokens, average[1] * self._decay + seconds


class _KnownKeys:
    """Keys of pages that the store had when it was last asked, the latest so many."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._keys: OrderedDict[bytes, None] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, key: bytes) -> bool:
        with self._lock:
            return key in self._keys

    def add(self, keys: Iterable[bytes]) -> None:
        with self._lock:
            for key in keys:
                self._keys[key] = None
                self._keys.move_to_end(key)
            while len(self._keys) > self._most:
                self._keys.popitem(last=False)

    def discard(self, keys: Iterable[bytes]) -> None:
        with self._lock:
            for key in keys:
                self._keys.pop(key, None)


def _in_order(paths: Collection[Path]) -> list[Path]:
    """The prompt path first: a page of the decode path may stand on it, never the reverse."""
    order: tuple[Path, Path] = ("prompt", "decode")
    return [path for path in order if path in paths]


def _within(count: object, most: int) -> int:
    """A store's answer, as far as it can be true."""
    return max(0, min(count, most)) if isinstance(count, int) else 0
