"""Who answers prepared requests: the engine's process, another provider, or a test's stand-in."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from abyssal.engine.wire import Statistics
from abyssal.serve.events import EngineEvent, Prepared


class State(Enum):
    """Of a service; its value is what ``/ready`` says."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    """Its process died and is being started again."""
    FAILED = "failed"
    """It cannot run, and nobody tries any more."""


@dataclass(frozen=True)
class Origin:
    """From whom a request comes."""

    request_id: str
    """As the response's header has it, for logs and traces."""
    namespace: str = ""
    """Of the context cache: only requests with the same one share pages."""
    user: str = ""
    """Between whom service is shared fairly: the account; on an open server the caller's own user."""


class Service(Protocol):
    """Runs requests."""

    @property
    def state(self) -> State: ...

    @property
    def statistics(self) -> Statistics:
        """The newest; all zero before any."""
        ...

    def run(self, prepared: Prepared, origin: Origin) -> AsyncGenerator[EngineEvent, None]:
        """Events of all choices as they come, each choice's in order.  Closing the generator cancels the request at
        once.

        Raises:
            ApiError: 422 the request cannot be met, 503 the service is not ready or its process died meanwhile.
        """
        ...
