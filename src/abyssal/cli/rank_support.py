"""What this machine has for runs on many ranks."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import distributed


@dataclass(frozen=True)
class RankSupport:
    """Of ``torch.distributed`` and what goes with it."""

    backends: tuple[str, ...]
    """That this torch was built with."""
    torchrun: str | None
    """What starts ranks: the command beside this Python, or its module; None where torch has neither."""
    deep_ep: str | None
    """Version of DeepEP, NVIDIA GPUs' own dispatch; None where it is not installed."""


def rank_support() -> RankSupport:
    """Look; nothing is started."""
    if not distributed.is_available():
        return RankSupport((), None, None)
    there = {
        "gloo": distributed.is_gloo_available(),
        "nccl": distributed.is_nccl_available(),
        "mpi": distributed.is_mpi_available(),
        "ucc": distributed.is_ucc_available(),
    }
    return RankSupport(tuple(name for name, is_there in there.items() if is_there), _torchrun(), _deep_ep())


def _torchrun() -> str | None:
    beside = Path(sys.executable).with_name("torchrun")
    if beside.exists():
        return str(beside)
    if importlib.util.find_spec("torch.distributed.run") is not None:
        return shutil.which("torchrun") or f"{sys.executable} -m torch.distributed.run"
    return None


def _deep_ep() -> str | None:
    if importlib.util.find_spec("deep_ep") is None:
        return None
    try:
        return version("deep_ep")
    except PackageNotFoundError:
        return "of no stated version"
