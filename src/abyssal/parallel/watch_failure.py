"""Why a run ends: which rank, where, and what it was doing; as it passes between ranks and as the user reads it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

Kind = Literal["problem", "interrupted", "failed", "ended", "silent", "stands", "deadlock", "unreachable"]
_WHAT: dict[Kind, str] = {
    "problem": "found a problem",
    "interrupted": "was interrupted",
    "failed": "failed",
    "ended": "is gone: its process ended without a word, as one does that is killed or runs out of memory",
    "silent": "gave no sign of life for {seconds:.0f} s: it is stopped, or its machine or network is gone",
    "stands": "made no progress for {seconds:.0f} s while others waited for it",
    "deadlock": "and all others wait for one another, for {seconds:.0f} s: they are in different collectives",
    "unreachable": "cannot reach the ranks' common store any more: the launcher or the network is gone",
}
EXIT_CODES: dict[Kind, int] = {"problem": 2, "interrupted": 130}
"""Of kinds that are no failure of a rank; every other is 1."""


@dataclass(frozen=True)
class Failure:
    """What one rank did, or failed to do, that ends all."""

    kind: Kind
    rank: int
    host: str
    pid: int
    step: int = 0
    """Steps that it had done, as far as is known."""
    phase: str = ""
    """What it was doing then."""
    seconds: float = 0.0
    """How long it had been silent, or had stood still."""
    text: str = ""
    """Of a problem its message, otherwise a traceback or where its main thread stood."""

    @property
    def exit_code(self) -> int:
        return EXIT_CODES.get(self.kind, 1)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Failure:
        return cls(**json.loads(text))

    def message(self, me: int, world_size: int) -> str:
        """What rank ``me`` tells the user."""
        who = f"rank {self.rank} of {world_size} ({self.host}, pid {self.pid})"
        if self.kind == "problem":
            return f"rank {self.rank} ({self.host}): {self.text}"
        what = _WHAT[self.kind].format(seconds=self.seconds)
        heard = "last heard of at " if self.kind in ("ended", "silent") else ""
        where = f"{heard}step {self.step}" + (f", {self.phase}" if self.phase else "")
        ends = "it ends" if me == self.rank else f"rank {me} ends with it"
        head = f"{who} {what} ({where}); {ends}"
        return f"{head}\n{self.text.rstrip()}" if self.text else head
