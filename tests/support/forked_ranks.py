"""Ranks of one run without torchrun: processes with its variables, and a store that the test keeps.

A :class:`RankStarter` is a process of one thread that has imported everything; ranks are forked from it, so that none
pays the seconds of Python's start.  The test keeps the store, as torchrun's agent does, so that it outlives ranks.

    python -m tests.support.forked_ranks      reads a start as a line of JSON, answers with process ids, then with ends
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """How a rank's process ended."""

    code: int
    """Negative: of the signal that ended it."""
    output: str
    errors: str
    at: float
    """When, on the monotonic clock."""


class RankStarter:
    """Starts ranks; a context manager."""

    def __enter__(self) -> RankStarter:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forked_ranks"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        return self

    def __exit__(self, *_: object) -> None:
        self._requests.close()
        self._process.wait(10)
        self._folder.cleanup()

    def start(
        self,
        world_size: int,
        what: str,
        *arguments: str,
        variables: Mapping[int, Mapping[str, str]] | None = None,
        ranks: Sequence[int] | None = None,
        store: Any = None,
    ) -> StartedRanks:
        """Start ranks that run ``what``: abyssal; hung, the same with a rank that stops; or, watched,
        :mod:`tests.support.watched_rank`.

        Args:
            variables: of the environment, by rank, beyond torchrun's.
            ranks: those that are started; all by default.
            store: of an earlier start, to start again what was started there.
        """
        from torch import distributed

        if store is None:
            store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        folder = tempfile.mkdtemp(dir=self._folder.name)
        environments = {
            rank: rank_variables(rank, world_size, store.port) | dict((variables or {}).get(rank, {}))
            for rank in (range(world_size) if ranks is None else ranks)
        }
        request = {"what": what, "arguments": arguments, "environments": environments, "folder": folder}
        self._requests.write(json.dumps(request) + "\n")
        self._requests.flush()
        pids = {int(rank): pid for rank, pid in self.answer().items()}
        return StartedRanks(self, Path(folder), pids, store)

    def answer(self) -> dict[str, Any]:
        """The next line of the process that starts ranks."""
        line = self._answers.readline()
        assert line, "the process that starts ranks has ended"
        return json.loads(line)


@dataclass(frozen=True)
class StartedRanks:
    """Ranks of one start."""

    starter: RankStarter
    folder: Path
    pids: Mapping[int, int]
    store: Any

    def wait(self, timeout: float = 60.0) -> dict[int, Ended]:
        """How each ended; those that have not by then are killed, and the test fails."""
        watchdog = subprocess.Popen(
            ["sh", "-c", f"sleep {timeout}; kill -9 {' '.join(map(str, self.pids.values()))}"],
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        begin = time.monotonic()
        ends = self.starter.answer()
        took = time.monotonic() - begin
        os.killpg(watchdog.pid, signal.SIGKILL)
        watchdog.wait()
        ended = {int(rank): Ended(*self._texts(code, rank), at) for rank, (code, at) in ends.items()}
        assert took < timeout, f"ranks did not end within {timeout} s: {ended}"
        return ended

    def _texts(self, code: int, rank: str) -> tuple[int, str, str]:
        return code, (self.folder / f"{rank}.out").read_text(), (self.folder / f"{rank}.err").read_text()


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
    }


def _fork(what: str, arguments: list[str], environment: dict[str, str], outputs: tuple[str, str]) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ.update(environment)
        for target, path in ((1, outputs[0]), (2, outputs[1])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), target)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        status = _run(what, arguments)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run(what: str, arguments: list[str]) -> int:
    if what == "hung":
        _hang_in_a_step()
    if what in ("abyssal", "hung"):
        from abyssal.cli.main import main

        return main(arguments)
    from tests.support.watched_rank import run

    return run(arguments)


def _hang_in_a_step() -> None:
    """Let rank 1 stand still in its fourth step, with the others waiting for its tokens."""
    from abyssal.train.step import Trainer

    step = Trainer.step

    def hung(trainer: Trainer, batch: Any) -> Any:
        if os.environ["RANK"] == "1" and trainer.steps_done == 3:
            time.sleep(600)
        return step(trainer, batch)

    Trainer.step = hung  # pyright: ignore[reportAttributeAccessIssue]


def _serve() -> None:
    import torch

    import abyssal.train.sft  # noqa: F401 - so that no rank has to import them
    import tests.support.watched_rank  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        pids = {}
        for rank, environment in request["environments"].items():
            outputs = f"{request['folder']}/{rank}.out", f"{request['folder']}/{rank}.err"
            pids[rank] = _fork(request["what"], request["arguments"], environment, outputs)
        print(json.dumps(pids), flush=True)
        by_pid, ends = {pid: rank for rank, pid in pids.items()}, {}
        while len(ends) < len(pids):
            pid, status = os.wait()
            ends[by_pid[pid]] = os.waitstatus_to_exitcode(status), time.monotonic()
        print(json.dumps(ends), flush=True)


if __name__ == "__main__":
    _serve()
