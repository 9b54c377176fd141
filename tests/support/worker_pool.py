"""Worker processes that outlive a test, so that each test of parallel code does not pay seconds to start Python.

A :class:`WorkerPool` starts its processes when first asked, keeps them, and joins them into a gloo process group of
the size that a call wants.  Nothing is shared with the test but pickles: a worker gets a top-level function with its
arguments, and sends back the result or the traceback.

A group in which a call failed is never used again: its members may be in different collectives.  When every rank
answered, the group alone is made anew; when one did not, its processes are ended and new ones start at the next call.
"""

from __future__ import annotations

import faulthandler
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

DEFAULT_TIMEOUT = 150.0
"""Generous: eight processes that start on a busy machine take a minute."""
GRACE_AFTER_FAILURE = 1.0
"""Seconds that the other ranks get to finish once one has failed: most then wait for it in a collective."""


class WorkerFailure(Exception):
    """A function raised in a worker; the message holds the traceback of each rank that failed."""


class WorkerPool:
    """Processes for ranks 0, 1, ..., started as wider groups are asked for."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="workers-")
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._generations = itertools.count()
        self._group: tuple[int, int] | None = None

    def __call__(self, world_size: int, timeout: float = DEFAULT_TIMEOUT) -> Callable[..., list[Any]]:
        """``pool(world_size)(function, *args)`` -> the results by rank.

        ``function`` is a picklable top-level function.  It runs on every rank with torch on one thread and the default
        process group initialised over gloo; it learns its rank from ``torch.distributed.get_rank()``.

        Raises:
            WorkerFailure: it raised on some rank.
            TimeoutError: a rank gave no answer within ``timeout`` seconds; the message shows where it stood.
        """

        def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
            return self._run(world_size, timeout, pickle.dumps((function, args, kwargs)))

        return run

    def close(self) -> None:
        """End the processes.  The pool can be used again and then starts new ones."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._connections, self._group = [], [], None

    def _run(self, world_size: int, timeout: float, call: bytes) -> list[Any]:
        self._grow(world_size)
        if self._group is None or self._group[1] != world_size:
            self._group = (next(self._generations), world_size)
        for connection in self._connections[:world_size]:
            connection.send((self._group, call))
        answers = self._collect(world_size, timeout)
        silent = [rank for rank in range(world_size) if rank not in answers]
        failures = {rank: text for rank, (ok, text) in answers.items() if not ok}
        if failures:
            self._group = None
        if silent:
            stacks = "\n".join(f"rank {rank} stood at:\n{self._stack(rank)}" for rank in silent)
            self.close()
            if not failures:
                raise TimeoutError(f"no answer from ranks {silent} within {timeout} s\n{stacks}")
        if failures:
            raise WorkerFailure("\n".join(f"rank {rank} of {world_size}:\n{failures[rank]}" for rank in failures))
        return [pickle.loads(answers[rank][1]) for rank in range(world_size)]

    def _grow(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self._processes) < world_size:
            rank = len(self._processes)
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, theirs, self._folder.name), daemon=True, name=f"test worker {rank}"
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _collect(self, world_size: int, timeout: float) -> dict[int, tuple[bool, Any]]:
        """Answers by rank until all are there, the time is up, or the grace after a first failure is over."""
        waiting = {self._connections[rank]: rank for rank in range(world_size)}
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(waiting), left):
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    answers[rank] = connection.recv()
                except EOFError:
                    self._processes[rank].join()
                    answers[rank] = (False, f"the process ended with exit code {self._processes[rank].exitcode}")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_AFTER_FAILURE)
        if any(not process.is_alive() for process in self._processes):
            self.close()
        return answers

    def _stack(self, rank: int) -> str:
        """Where the process of a silent rank stands, by its own signal handler."""
        path = _stack_file(self._folder.name, rank)
        process = self._processes[rank] if rank < len(self._processes) else None
        if process is None or process.pid is None or not path.exists():
            return "(unknown)"
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.2)
        return path.read_text()


def _stack_file(folder: str, rank: int) -> Path:
    return Path(folder, f"stack-{rank}.txt")


def _serve(rank: int, connection: Connection, folder: str) -> None:
    """A worker's life: join the group that a call names, run it, answer; until the pipe closes."""
    import torch

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    with _stack_file(folder, rank).open("w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file)
        group = None
        while True:
            try:
                wanted, call = connection.recv()
            except EOFError:
                return
            try:
                if wanted != group:
                    group = None
                    _join(rank, wanted, folder)
                    group = wanted
                function, args, kwargs = pickle.loads(call)
                answer = (True, pickle.dumps(function(*args, **kwargs)))
            except BaseException:
                answer = (False, traceback.format_exc())
            connection.send(answer)


def _join(rank: int, group: tuple[int, int], folder: str) -> None:
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
    generation, world_size = group
    store = distributed.FileStore(str(Path(folder, f"store-{generation}")), world_size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
