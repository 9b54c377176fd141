"""What all parts of the benchmark are told, and what a part is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support.limits import matmul_peak, memory_bandwidth
from support.peer import DTYPES

Case = dict[str, Any]
"""What names a row: preset, dtype, and what else the part varies."""


@dataclass(frozen=True)
class Setting:
    """Choices of a run."""

    presets: tuple[str, ...]
    dtypes: tuple[str, ...]
    repeats: int
    """Rounds after one to warm up."""
    requests: int
    """Of each load."""
    scratch: Path
    """Folder for models and caches of this run."""
    model: Path
    """Folder of the trained model."""
    traces: Path | None
    """Folder of the request traces; None: there is none."""
    batches: tuple[int, ...] = (1, 8, 32)
    threads: tuple[int, ...] = (1, 2)
    """Of the engine, where a part varies them."""
    smoke: bool = False
    """Sizes that only show that everything runs."""

    def cases(self) -> list[Case]:
        """Each preset in each dtype."""
        return [{"preset": preset, "dtype": dtype} for preset in self.presets for dtype in self.dtypes]


@dataclass(frozen=True)
class Part:
    """One question to the engine."""

    name: str
    title: str
    cases: Callable[[Setting], list[Case]]
    measure: Callable[[Case, Setting], dict[str, Any]]
    """The row of a case: its fields and the figures."""
    lines: Callable[[dict[str, Any]], list[str]]
    """A row as text."""


@dataclass
class Limits:
    """This machine's limits, the best of all that was seen while a row was measured."""

    dtype: str
    values: dict[str, float] = field(default_factory=dict)

    def look(self) -> None:
        """Measure them now."""
        seen = {"memory GB/s": memory_bandwidth(), f"{self.dtype} GFLOP/s": matmul_peak(DTYPES[self.dtype])}
        self.values = {name: max(value, self.values.get(name, 0.0)) for name, value in seen.items()}

    @property
    def bytes_per_second(self) -> float:
        return self.values["memory GB/s"] * 1e9

    @property
    def flops_per_second(self) -> float:
        return self.values[f"{self.dtype} GFLOP/s"] * 1e9


def random_prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    """(count, length) token ids, none of them a control token."""
    return torch.randint(2, vocab_size, (count, length), generator=torch.Generator().manual_seed(seed))
