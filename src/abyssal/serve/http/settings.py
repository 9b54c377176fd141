"""Limits of the HTTP front, each with a default that suits one machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HttpSettings:
    """What the front lets in, and how long it waits."""

    model: str
    """Name of the model that runs here."""
    most_requests: int = 1024
    """For an answer, at a time, those in the engine's queue included; beyond it comes 503."""
    body_bytes: int = 16 << 20
    """Of one request's body; beyond it comes 413."""
    bodies_bytes: int = 256 << 20
    """Of all bodies that are being read or made ready; a large one beyond it gets 503."""
    body_seconds: float = 30.0
    """For a body to come, and one more for each 64 KiB of it; then comes 408."""
    keep_alive_seconds: float = 10.0
    """After which a client that waits gets a sign of life: a comment in a stream, an empty line before a plain answer.
    Until the first one, an error has a status of its own; after it the status is 200."""
    write_seconds: float = 60.0
    """For a client to take what it was sent; then it counts as gone."""
    cors_origins: tuple[str, ...] = ()
    """Pages of other servers whose scripts may ask, such as ``https://chat.example``; ``*`` for all."""
    hosts: tuple[str, ...] = ()
    """Names by which the server may be called (the header Host); none is any.  A server without keys needs them: else
    a page from anywhere could have its own name point here, and read the answers."""
    free_priority: bool = True
    """Whether a request may put itself before others by ``priority``; one behind them it may always."""
    log_prompts: bool = False
    """Whether logs may hold what requests say."""
