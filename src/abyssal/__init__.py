"""abyssal: train, serve and plan DeepSeek-V3-class language models.

Names are imported when they are first used, so that ``import abyssal`` and the parts that are free of torch stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abyssal.checkpoint.hf import load_model as load_model
    from abyssal.engine.config import EngineConfig as EngineConfig
    from abyssal.engine.llm import LLM as LLM
    from abyssal.engine.messages import SamplingParams as SamplingParams
    from abyssal.spec.model import ModelSpec as ModelSpec
    from abyssal.spec.presets import preset as preset

    __version__: str

_HOMES = {
    "EngineConfig": "abyssal.engine.core",
    "LLM": "abyssal.engine.llm",
    "ModelSpec": "abyssal.spec.model",
    "SamplingParams": "abyssal.engine.messages",
    "load_model": "abyssal.checkpoint.hf",
    "preset": "abyssal.spec.presets",
}

__all__ = ["LLM", "EngineConfig", "ModelSpec", "SamplingParams", "__version__", "load_model", "preset"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name == "__version__":
        value = _installed_version()
    else:
        raise AttributeError(f"module 'abyssal' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("abyssal")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"
