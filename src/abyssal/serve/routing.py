"""Models that other providers run, behind this server's API: who answers for a name, and what he has to do.

A provider gets a request's body as it was read and gives OpenAI's chunks or body back, with the usage; keys, limits and
charging are the front's, as for the model that runs here.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from abyssal.serve.events import Usage
from abyssal.serve.service import Origin

Kind = Literal["chat", "completions"]
"""Which API of OpenAI's: ``/v1/chat/completions`` or ``/v1/completions``."""


@dataclass(frozen=True)
class Routed:
    """A request made ready for a provider."""

    model: str
    """As the client wrote it, prefix included: what prices and the usage log know it by."""
    kind: Kind
    body: Mapping[str, Any]
    """What the provider sends."""
    stream: bool
    prompt_tokens: int
    """Estimated; with the next, what is set aside of the balance until the usage is known."""
    most_output_tokens: int
    """Of all choices together."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer."""

    body: Mapping[str, Any] | None = None
    """A stream's chunk, or the whole answer, as the client is to have it; None where only ``usage`` is new."""
    usage: Usage | None = None
    """So far; the newest is charged, also where the client leaves.  A provider that learns it at the end alone counts
    meanwhile as well as it can."""


class Provider(Protocol):
    """Runs requests elsewhere."""

    def prepare(self, kind: Kind, body: Mapping[str, Any]) -> Routed:
        """Called in a thread.

        Raises:
            ApiError: what is wrong with the body, by name.
        """
        ...

    def run(self, routed: Routed, origin: Origin) -> AsyncGenerator[Piece, None]:
        """A stream's chunks without the ``[DONE]`` behind them (one of usage where ``stream_options`` ask for it), or
        one piece with the body.  Closing the generator cancels the request at once.

        Raises:
            ApiError: what the provider refused, with its status; 502 it failed, 504 it did not answer in time.
        """
        ...

    async def close(self) -> None:
        """The server ends."""
        ...


@dataclass(frozen=True)
class Routes:
    """Providers by the prefix of the names of their models."""

    providers: Mapping[str, Provider]

    def provider(self, model: object) -> Provider | None:
        """Of the longest prefix that ``model`` begins with; None where it is to run here."""
        if not isinstance(model, str):
            return None
        prefixes = [prefix for prefix in self.providers if model.startswith(prefix)]
        return self.providers[max(prefixes, key=len)] if prefixes else None

    async def close(self) -> None:
        for provider in self.providers.values():
            await provider.close()


NO_ROUTES = Routes({})
