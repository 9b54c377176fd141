"""A model folder opened for an engine: its weights, its tokenizer, and where its pages are kept.

The tokenizer that an engine writes text with may differ from the folder's in what it shows (a server's shows the marks
of calls and reasoning); what pages on disk are known by is the folder's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from abyssal.checkpoint.hf import load_model
from abyssal.engine.config import EngineConfig
from abyssal.engine.disk import LoadedFiles, open_disk_cache
from abyssal.engine.stored import StoredPages
from abyssal.model.transformer import Transformer
from abyssal.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class OpenedFolder:
    """What an engine is made of."""

    model: Transformer
    tokenizer: Tokenizer
    """The folder's."""
    stored: StoredPages | None
    """None: nothing is kept on disk."""


def open_folder(
    path: str | Path,
    config: EngineConfig,
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
    stored: StoredPages | None = None,
) -> OpenedFolder:
    """Load a model folder.

    Args:
        dtype: of weights and activations; the folder's by default.
        tokenizer: by default the folder's.
        stored: by default a cache on disk, as ``config`` says.

    Raises:
        ValueError, OSError: what :func:`~abyssal.checkpoint.hf.load_model` and the tokenizer raise; a folder for the
            disk cache that cannot be used.
    """
    tokenizer = Tokenizer.from_folder(path) if tokenizer is None else tokenizer
    num_drafts, loaded = config.num_drafts, LoadedFiles.before(Path(path))
    model = load_model(path, dtype=dtype, mtp=None if num_drafts == "auto" else bool(num_drafts))
    tokenizer.check_fits(model.spec)
    if stored is None and config.disk_cache:
        stored = open_disk_cache(loaded, model, tokenizer, config.disk_cache_folder, config.disk_cache_bytes)
    return OpenedFolder(model, tokenizer, stored)
