"""The server in a process of its own, as its users run it, and what it counts of its engine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

NAME = "served"
_READY = re.compile(r" at http://127\.0\.0\.1:(\d+)")


@dataclass(frozen=True)
class Counted:
    """Of the engine since it started."""

    output_tokens: float
    steps: float
    step_seconds: float


class ServerProcess:
    """``abyssal serve FOLDER`` on a free port of loopback, once it is ready.

    Args:
        options: of the verb.
        threads: of the engine's products; None leaves them to torch.

    Raises:
        RuntimeError: it ended; the message holds the end of its log.
    """

    def __init__(self, folder: Path, *options: str, threads: int | None = None) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        command = [sys.executable, "-m", "abyssal", "serve", str(folder), "--port", "0", "--name", NAME, *options]
        environment = {**os.environ, "XDG_DATA_HOME": str(folder / "no-accounts")}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment)
        assert self._process.stdout is not None
        found = _READY.search(self._process.stdout.readline())
        if found is None:
            self._process.kill()
            self._log.seek(0)
            raise RuntimeError(f"{' '.join(command)} did not get ready:\n{self._log.read()[-2000:]}")
        self.port = int(found.group(1))
        self._engine = _engine_of(self._process.pid)

    def counted(self) -> Counted:
        """Now."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as response:
            text = response.read().decode()
        names = ("vllm:generation_tokens_total", "abyssal:engine_steps_total", "abyssal:engine_step_seconds_total")
        tokens, steps, seconds = (_value(text, name) for name in names)
        return Counted(tokens, steps, seconds)

    def cpu_seconds(self) -> float:
        """That the engine's process has computed, all threads together."""
        user, system = Path(f"/proc/{self._engine}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End it, and wait until it has."""
        self._process.send_signal(signal.SIGTERM)
        self._process.communicate()
        self._log.close()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _engine_of(pid: int) -> int:
    """The engine's process: the one child that runs it."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            if "abyssal.engine.worker" in Path(f"/proc/{child}/cmdline").read_text():
                return int(child)
    raise RuntimeError(f"process {pid} has no engine")


def _value(metrics: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)", metrics, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"the server has no metric {name}")
    return float(found.group(1))
