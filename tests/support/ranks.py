"""Processes that stand as ranks of one run, without torchrun: its variables, and a store of the test's own.

The store is kept by the test, as torchrun's agent does, so that it outlives ranks that are killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import distributed

ROOT = Path(__file__).parents[2]


@dataclass
class StartedRanks:
    """Ranks of one start; a context manager that ends whatever is left of them."""

    world_size: int
    command: Sequence[str]
    """After the interpreter."""
    environments: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    """More variables, by rank."""
    ranks: Sequence[int] | None = None
    """Those that are started; all by default."""
    processes: dict[int, subprocess.Popen[str]] = field(default_factory=dict)

    def __enter__(self) -> StartedRanks:
        self.store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.world_size) if self.ranks is None else self.ranks:
            self.processes[rank] = subprocess.Popen(
                [sys.executable, *self.command],
                cwd=ROOT,
                env=os.environ
                | rank_variables(rank, self.world_size, self.store.port)
                | self.environments.get(rank, {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.communicate()

    def wait(self, timeout: float = 60.0) -> dict[int, Ended]:
        """How each rank ended."""
        deadline = time.monotonic() + timeout
        ended = {}
        for rank, process in self.processes.items():
            output, errors = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            ended[rank] = Ended(process.returncode, output, errors)
        return ended


@dataclass(frozen=True)
class Ended:
    """How a rank's process ended."""

    code: int
    output: str
    errors: str


def rank_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would set."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }
