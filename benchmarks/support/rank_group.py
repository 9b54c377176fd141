"""Ranks on nodes with slow links between them, each a process that answers requests; see ``support/rank.py``."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from .link import Links


class RankGroup:
    """``ranks_per_node`` processes on each node of ``links``, numbered node by node.  A context manager.

    Args:
        module: run with ``python -m``; it serves with :func:`support.rank.serve`.
        request: JSON that every rank is given at its start.
        timeout: seconds that a collective may take.
    """

    def __init__(
        self, links: Links, ranks_per_node: int, module: str, request: dict[str, Any], timeout: float = 120.0
    ) -> None:
        self._links, self._ranks_per_node = links, ranks_per_node
        self._command = [sys.executable, "-m", module, json.dumps(request)]
        self._timeout = timeout
        self._stack = contextlib.ExitStack()
        self._processes: list[subprocess.Popen[str]] = []
        self._errors: list[IO[str]] = []

    def __enter__(self) -> RankGroup:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            stack.callback(self._end)
            for rank in range(self._links.num_nodes * self._ranks_per_node):
                self._start(rank, Path(folder, "store"), stack)
            self._answers()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def ask(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Every rank's answer.

        Raises:
            RuntimeError: a rank ended; the message holds the end of what it printed.
        """
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it ended; its answer says so
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
        return self._answers()

    def _start(self, rank: int, store: Path, stack: contextlib.ExitStack) -> None:
        environment = {
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "WORLD_SIZE": str(self._links.num_nodes * self._ranks_per_node),
            "LOCAL_WORLD_SIZE": str(self._ranks_per_node),
            "BENCHMARK_STORE": str(store),
            "BENCHMARK_TIMEOUT": str(self._timeout),
        }
        errors = stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115 - the stack closes it
        self._errors.append(errors)
        node = rank // self._ranks_per_node
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        self._processes.append(self._links.start(node, self._command, environment, **pipes))

    def _answers(self) -> list[dict[str, Any]]:
        lines = []
        for process in self._processes:
            assert process.stdout is not None
            lines.append(process.stdout.readline())
        ended = [rank for rank, line in enumerate(lines) if not line]
        if ended:
            raise RuntimeError("\n".join(f"rank {rank} ended:\n{self._said(rank)}" for rank in ended))
        return [json.loads(line) for line in lines]

    def _said(self, rank: int) -> str:
        self._processes[rank].wait(10)
        self._errors[rank].seek(0)
        return self._errors[rank].read()[-2000:]

    def _end(self) -> None:
        """Close every rank's input, at which it ends; kill what does not."""
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        self._processes.clear()
