"""What the launcher says of this process: torchrun's environment variables as a record; free of torch.

torchrun starts a process a rank and tells each its number, how many there are, where their common key-value store
listens, and how often they have been started before.  Slurm's ``srun`` or a test may set the same variables.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

TORCHRUN = "torchrun --nproc-per-node {ranks} -m abyssal {verb} ..."
"""The line that starts so many ranks on this machine."""


@dataclass(frozen=True)
class Launch:
    """One rank of a group that was started together.

    Raises:
        ValueError: numbers that do not go together.
    """

    rank: int
    world_size: int
    local_rank: int = 0
    """Among the ranks that were started on this machine; also the number of its GPU."""
    local_world_size: int = 1
    """Ranks that were started on this machine."""
    address: str = "localhost"
    port: int = 29500
    restarts: int = 0
    """How often the launcher has started these ranks before."""
    launcher_has_store: bool = False
    """Whether the launcher itself keeps the store, which then outlives the ranks; otherwise rank 0 does."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"RANK is {self.rank} and WORLD_SIZE {self.world_size}; ranks are 0 to WORLD_SIZE - 1")
        if not 0 <= self.local_rank < self.local_world_size <= self.world_size:
            raise ValueError(
                f"LOCAL_RANK is {self.local_rank} and LOCAL_WORLD_SIZE {self.local_world_size} of {self.world_size} "
                "ranks; local ranks are 0 to LOCAL_WORLD_SIZE - 1"
            )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Launch | None:
        """What the environment says; None where nothing started this process as a rank.

        Raises:
            ValueError: a variable that is missing beside ``RANK``, or no number.
        """
        variables = os.environ if environment is None else environment
        if "RANK" not in variables:
            return None
        return cls(
            rank=_number(variables, "RANK"),
            world_size=_number(variables, "WORLD_SIZE"),
            local_rank=_number(variables, "LOCAL_RANK", 0),
            local_world_size=_number(variables, "LOCAL_WORLD_SIZE", 1),
            address=variables.get("MASTER_ADDR", "localhost"),
            port=_number(variables, "MASTER_PORT"),
            restarts=_number(variables, "TORCHELASTIC_RESTART_COUNT", 0),
            launcher_has_store=variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0


def _number(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = variables.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.strip().isdecimal():
        found = "is not set" if text is None else f"is {text!r}"
        raise ValueError(f"RANK is set and {name} {found}; start ranks with torchrun, which sets both, or unset RANK")
    return int(text)
