"""Which pages of one engine may serve another: the seed of the keys under which pages are stored.

A page on disk is worth something only to the very model that computed it, in the same dtype and layout, from the same
tokens, and for the same user.  All of that seeds the chain of hashes over the tokens
(:func:`abyssal.cache.prefix.unit_keys`), so whatever differs looks in another space and finds nothing: several models
can share a folder, and nobody can tell from a hit what another user wrote.

Weights are known by a digest of their files.  It is computed once and remembered by device, inode, size and times of
change, as git does, so that an engine starts without reading the model twice; a file that changed within the last two
seconds is not remembered, since a change that follows at once might leave its times alone.  Of a large model the first
digest takes minutes: it may be stopped, and the files that were read whole are remembered then.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

from abyssal.cache.prefix import KEY_BYTES, unit_keys
from abyssal.cache.prefix import Path as ComputedBy

MOST_REMEMBERED = 1 << 14
"""Digests that are remembered, the newest; a run that exports its model again and again leaves new files each time."""
_SETTLED_NANOSECONDS = 2_000_000_000
_THREADS = 4


@dataclass(frozen=True)
class PageSpace:
    """What two engines must have in common for pages of one to serve the other."""

    weights: str
    """Digest of the weights (:meth:`FileDigests.of`), and their version where they change while the engine runs."""
    dtype: str
    """Of activations and of the cache's entries."""
    tokenizer: str
    """Digest of the tokenizer's files."""
    layout: str
    """How a page's bytes are arranged: layers, values, tokens a page."""
    implementation: str = ""
    """Version of the program and of its kernels, where pages must be equal to the last bit."""

    def keys(self, tokens: Sequence[int], path: ComputedBy, namespace: str = "") -> list[bytes]:
        """Keys of the full units of ``tokens``, computed by ``path``, of the user ``namespace``."""
        return unit_keys(tokens, self.seed(path, namespace))

    def seed(self, path: ComputedBy, namespace: str = "") -> bytes:
        fields = json.dumps([asdict(self), path, namespace], sort_keys=True)
        return blake2b(fields.encode(), digest_size=KEY_BYTES, person=b"abyssal-space").digest()


def model_files(folder: Path) -> list[Path]:
    """The files of a model folder that its outputs depend on, the tokenizer's left out."""
    return sorted([*folder.glob("*.safetensors"), folder / "config.json"])


def identities(files: Iterable[Path]) -> list[str]:
    """What tells a file from another and from itself after a change, without reading it; empty for one that is not
    there."""
    return [_identity(path.stat()) if path.exists() else "" for path in files]


def _identity(status: os.stat_result) -> str:
    return ":".join(map(str, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)))


class Stopped(Exception):
    """A digest was given up half-way."""


class FileDigests:
    """Digests of files' contents, remembered in the file ``memory``.

    Args:
        num_threads: that read files at a time; 1 reads them in the caller's own.
    """

    def __init__(self, memory: Path, num_threads: int = _THREADS) -> None:
        self._memory = memory
        self._num_threads = num_threads

    def of(self, files: Iterable[Path], stopped: Callable[[], bool] = lambda: False) -> str:
        """One digest of all ``files``, their names and contents.

        Args:
            stopped: asked often; true gives up.

        Raises:
            OSError: a file cannot be read.
            Stopped: on request.
        """
        files = sorted(files)
        remembered = self._load()
        found: dict[str, str] = {}

        def digest(path: Path) -> str:
            return _digest(path, remembered, found, stopped)

        try:
            if self._num_threads == 1:
                digests = [digest(path) for path in files]
            else:
                with ThreadPoolExecutor(self._num_threads) as threads:
                    digests = list(threads.map(digest, files))
        finally:
            if found.items() - remembered.items():
                others = [item for item in remembered.items() if item[0] not in found]
                self._save(dict([*others, *found.items()][-MOST_REMEMBERED:]))
        names = [path.name for path in files]
        return blake2b(json.dumps([names, digests]).encode(), digest_size=KEY_BYTES).hexdigest()

    def _load(self) -> dict[str, str]:
        try:
            remembered = json.loads(self._memory.read_bytes())
        except (OSError, ValueError):  # what is lost is computed again
            return {}
        if not isinstance(remembered, dict):
            return {}
        return {name: digest for name, digest in remembered.items() if isinstance(digest, str)}

    def _save(self, digests: dict[str, str]) -> None:
        partial = self._memory.with_name(f".{self._memory.name}.{os.getpid()}")
        try:
            self._memory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(digests, file)
            os.replace(partial, self._memory)
        except OSError:  # costs the next start some time
            with suppress(OSError):
                partial.unlink()


class _StoppableFile(io.FileIO):
    """A file whose reading can be given up from another thread."""

    def __init__(self, path: Path, stopped: Callable[[], bool]) -> None:
        super().__init__(path)
        self._stopped = stopped

    def readinto(self, buffer: Any) -> int:
        if self._stopped():
            raise Stopped
        return super().readinto(buffer)


def _digest(path: Path, remembered: dict[str, str], found: dict[str, str], stopped: Callable[[], bool]) -> str:
    with _StoppableFile(path, stopped) as file:
        status = os.fstat(file.fileno())
        identity = _identity(status)
        digest = remembered.get(identity)
        if digest is None:
            digest = file_digest(file, lambda: blake2b(digest_size=KEY_BYTES)).hexdigest()
        changed = max(status.st_mtime_ns, status.st_ctime_ns)
        if changed < time.time_ns() - _SETTLED_NANOSECONDS:
            found[identity] = digest
        return digest
