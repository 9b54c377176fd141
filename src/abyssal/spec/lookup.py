"""One way to name a model on the command line: a preset, a model folder, or a ``config.json``."""

from __future__ import annotations

import os
from pathlib import Path

from abyssal.spec.hf_config import read_config
from abyssal.spec.model import ModelSpec
from abyssal.spec.presets import PRESETS, preset


def resolve(name_or_path: str | Path) -> ModelSpec:
    """The spec of a preset's name, a folder with a ``config.json``, or such a file.

    A preset's name wins over a folder of the same name; write ``./tiny`` for the folder.

    Raises:
        ValueError: neither a preset nor a path, or a configuration that is not supported.
    """
    if isinstance(name_or_path, str) and name_or_path in PRESETS:
        return preset(name_or_path)
    if not os.path.exists(name_or_path):
        raise ValueError(
            f"{name_or_path} is neither a file or folder nor a preset: give a model folder, or one of "
            f"{', '.join(PRESETS)}"
        )
    return read_config(name_or_path)
