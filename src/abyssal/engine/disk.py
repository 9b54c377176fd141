"""The disk cache of a model folder: where it lies, and which pages in it are this model's.

What must be alike for one engine's pages to serve another's, bit for bit, is everything that computes them: the
weights, the precision recipe, this program with its kernels, torch, and the instructions it chooses on this processor.
A version number would not do for the program: it stays the same while somebody works on it.  So its files are digested
like the model's, and like those remembered; together they are read once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import abyssal
from abyssal.cache.disk import DiskCache
from abyssal.cache.folder import CacheFolder, default_folder
from abyssal.cache.key import FileDigests, PageSpace, identities, model_files
from abyssal.engine.stored import StoredPages
from abyssal.kernels import native
from abyssal.model.transformer import Transformer
from abyssal.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_COMPUTING = ("kernels", "precision", "model", "spec")
"""Packages of ours on which a page's bits depend."""


@dataclass(frozen=True)
class LoadedFiles:
    """The files of a model folder as they were before a model was loaded from it: a digest that is computed later has
    to be of the same."""

    folder: Path
    identities: tuple[str, ...]

    @staticmethod
    def before(folder: Path) -> LoadedFiles:
        return LoadedFiles(folder, tuple(identities(model_files(folder))))


def open_disk_cache(
    loaded: LoadedFiles, model: Transformer, tokenizer: Tokenizer, folder: str | None, max_bytes: int | None
) -> StoredPages | None:
    """Pages on disk for a model that was ``loaded`` from files; None where the default folder cannot be used.

    Returns at once: files are opened, and the model's digested where no digest is remembered, in the background.

    Args:
        folder: of the cache, shared by any number of models and engines; None: the user's own.
        max_bytes: of all pages in it.

    Raises:
        ValueError: ``folder`` was named and cannot be used, or ``max_bytes`` is not above 0.
    """
    if max_bytes is not None and max_bytes <= 0:
        raise ValueError(f"disk_cache_bytes: {max_bytes} must be above 0; disk_cache=False turns the cache off")
    try:
        cache_folder = CacheFolder(default_folder() if folder is None else Path(folder))
        cache_folder.prepare()
    except (OSError, ValueError, RuntimeError) as error:  # the last: there is no home
        if folder is None:
            logger.warning("pages are not kept on disk: %s", error)
            return None
        raise ValueError(f"disk_cache_folder: {error}") from error
    space = page_space(model, tokenizer)

    def find_space(stopped: Callable[[], bool]) -> PageSpace:
        digests = FileDigests(cache_folder.digests, num_threads=1)  # the model runs meanwhile
        weights = digests.of(model_files(loaded.folder), stopped)
        if LoadedFiles.before(loaded.folder) != loaded:
            raise OSError(f"{loaded.folder}: its files changed while the model was loaded; load it again")
        return replace(
            space, weights=weights, implementation=f"{space.implementation} {digests.of(program_files(), stopped)}"
        )

    return StoredPages(lambda: DiskCache(cache_folder.root, max_bytes), find_space)


def page_space(model: Transformer, tokenizer: Tokenizer | None, weights: str = "") -> PageSpace:
    """What pages of a model have in common, but for its files.

    Args:
        weights: what the weights are known by.
    """
    return PageSpace(
        weights=weights,
        dtype=str(model.embed.weight.dtype),
        tokenizer="" if tokenizer is None else tokenizer.content_hash(),
        layout="",  # the engine's pages say it themselves
        implementation=" ".join(
            (
                abyssal.__version__,
                f"kernels {native.ABI_VERSION} {native.isa_name()}",
                f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()} {model.embed.weight.device.type}",
                model.recipe.identity(),
            )
        ),
    )


def program_files() -> list[Path]:
    """The files of this program that compute pages, native ones included."""
    package = Path(abyssal.__file__).parent
    return [
        path
        for name in _COMPUTING
        for path in sorted((package / name).rglob("*"))
        if path.is_file() and path.suffix in (".py", ".so", ".dylib")
    ]
