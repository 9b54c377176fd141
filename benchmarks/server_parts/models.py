"""A model folder that can be served: a preset with random weights, and a tokenizer of its size."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from support.peer import write_model

from abyssal.spec.presets import preset
from abyssal.text.tokenizer import train_bpe

_SOURCES = ("json", "email", "http", "logging")
"""Packages of the standard library, for the tokenizer to learn from."""


def servable_model(name: str, folder: Path) -> Path:
    """Preset ``name``, made once."""
    made = write_model(name, folder)
    if not (made / "tokenizer.json").exists():
        library = Path(sysconfig.get_path("stdlib"))
        files = (path for package in _SOURCES for path in sorted((library / package).rglob("*.py")))
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
        train_bpe(texts, preset(name).vocab_size).save(made)
    return made
