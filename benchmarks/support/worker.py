"""A contestant in a process of its own: with its own allocator and its own threads, as its users run it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from abyssal.cli.allocator import keep_freed_memory

Build = Callable[..., Callable[[], Any]]
"""Makes the measured function; called in the worker."""


def _serve(connection: Connection, keeps_memory: bool, build: Build, arguments: tuple[Any, ...]) -> None:
    if keeps_memory:
        keep_freed_memory()
    function = build(*arguments)
    connection.send(None)
    while connection.recv():
        connection.send(function())


class Worker:
    """``build(*arguments)`` in a new process; each call of the worker calls what it returned.

    Args:
        keeps_memory: set the allocator as ``abyssal train`` does, before anything else.
    """

    def __init__(self, build: Build, *arguments: Any, keeps_memory: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        target = (theirs, keeps_memory, build, arguments)
        self._process = context.Process(target=_serve, args=target, daemon=True)
        self._process.start()
        theirs.close()
        self._connection.recv()

    def __call__(self) -> Any:
        self._connection.send(True)
        return self._connection.recv()

    def close(self) -> None:
        self._connection.send(False)
        self._process.join()
