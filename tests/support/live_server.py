"""A real server: ``python -m abyssal serve FOLDER`` in a process of its own on a free port of loopback, with its engine
in another.  Tests speak HTTP to it as anybody would."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

START_SECONDS = 120.0
_READY = re.compile(r"^(?P<name>\S+) at (?P<url>http://\S+)")


@dataclass
class LiveServer:
    """A server that is ready, until :meth:`stop`."""

    process: subprocess.Popen[str]
    name: str
    """Of its model."""
    url: str
    log: deque[str] = field(default_factory=lambda: deque(maxlen=400))
    """The newest lines of its standard error."""
    threads: list[threading.Thread] = field(default_factory=list)

    @property
    def api(self) -> str:
        """OpenAI's ``base_url``."""
        return f"{self.url}/v1"

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def engine_pid(self) -> int | None:
        """Of the engine's process; None while there is none."""
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                for child in (task / "children").read_text().split():
                    if "abyssal.engine.worker" in Path(f"/proc/{child}/cmdline").read_text():
                        return int(child)
        return None

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, **options)

    def post(self, path: str, body: object, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Until ``/ready`` says so."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(httpx.HTTPError):
                if self.get("/ready").status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(f"not ready within {seconds} s; its log ends:\n{self.tail()}")

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)", self.get("/metrics").text, re.MULTILINE)
        assert found, f"there is no metric {name}"
        return sum(map(float, found))

    def tail(self) -> str:
        return "\n".join([*self.log][-40:])

    def stop(self) -> int:
        """End it as an operator would; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()
        for thread in self.threads:
            thread.join(5)
        return self.process.returncode

    def kill(self) -> None:
        """End it as the kernel would."""
        self.process.kill()
        self.process.wait(30)


def start_server(folder: Path, *options: str, data: Path | None = None, environment: Any = None) -> LiveServer:
    """A server of the model folder, once it is ready.

    Args:
        options: of ``abyssal serve``.
        data: folder where it looks for accounts; by default one that has none.
    """
    command = [sys.executable, "-m", "abyssal", "serve", str(folder), "--port", "0", *options]
    own = {"OMP_NUM_THREADS": "1", "XDG_DATA_HOME": str(data or folder / "no-accounts"), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, **own, **(environment or {})},
    )
    server = LiveServer(process, "", "")
    assert process.stdout is not None and process.stderr is not None
    found = threading.Event()

    def listen(lines: Any) -> None:
        for line in lines:
            if match := _READY.match(line):
                server.name, server.url = match["name"], match["url"]
                found.set()
        found.set()

    for target, stream in ((listen, process.stdout), (server.log.extend, _lines(process.stderr))):
        thread = threading.Thread(target=target, args=(stream,), daemon=True)
        thread.start()
        server.threads.append(thread)
    if not found.wait(START_SECONDS) or not server.url:
        server.kill()
        raise AssertionError(f"{' '.join(command)} did not get ready; its log ends:\n{server.tail()}")
    return server


def _lines(stream: Any) -> Iterator[str]:
    for line in stream:
        yield line.rstrip("\n")


@contextmanager
def live_server(folder: Path, *options: str, **more: Any) -> Iterator[LiveServer]:
    """:func:`start_server`, ended behind the block."""
    server = start_server(folder, *options, **more)
    try:
        yield server
    finally:
        server.stop()


def open_handles(pids: Sequence[int]) -> int:
    """File handles of the processes together."""
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
