"""Engines' processes that die, hang, cannot start, or whose front dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from abyssal.engine.config import EngineConfig
from abyssal.engine.llm import LLM
from abyssal.engine.messages import SamplingParams
from abyssal.serve.engine.service import EngineService
from abyssal.serve.engine.supervisor import Supervision
from abyssal.serve.protocol.errors import ApiError
from abyssal.serve.service import State
from tests.support.engine_service import RunningService, collect, newest_statistics, prepared, until
from tests.support.trained_model import TrainedModel

PARAMS = SamplingParams(temperature=0.8, seed=7, max_tokens=24, ignore_eos=True)
ENDLESS = replace(PARAMS, max_tokens=900)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("disk") / "pages")


@pytest.fixture(scope="module")
def running(trained_model: TrainedModel, disk: str) -> Iterator[RunningService]:
    """May be killed: it comes back."""
    supervision = Supervision(silence=1.0, most_quick=9)
    running = RunningService(trained_model.folder, supervision, disk_cache_folder=disk, cache_tokens=8192)
    running.ready()
    yield running
    running.close()


async def failures(service: EngineService, count: int, bring_about: int | None) -> tuple[list[object], float]:
    """What becomes of so many requests under way when a signal is sent, and after how many seconds."""
    answers = [asyncio.create_task(collect(service, prepared([(5 + i, 6)], ENDLESS))) for i in range(count)]
    await until(lambda: service.statistics.running >= min(count, 8))
    begun, pid = time.monotonic(), service.pid
    assert pid is not None and bring_about is not None
    os.kill(pid, bring_about)
    return await asyncio.gather(*answers, return_exceptions=True), time.monotonic() - begun


def test_neither_the_folders_name_nor_what_lies_beside_it_matters(
    trained_model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "-model").symlink_to(trained_model.folder)
    (tmp_path / "random.py").write_text("raise SystemExit('not the library')")
    monkeypatch.chdir(tmp_path)
    running = RunningService(Path("-model"), disk_cache=False)
    try:
        assert running.ready().state is State.READY
    finally:
        running.close()


def test_killed_under_load_it_comes_back_and_finds_its_disk_cache(
    running: RunningService, trained_model: TrainedModel
) -> None:
    prompt = tuple(trained_model.tokenizer.encode("def main(self):\n    return self.value\n" * 30))[:400]
    first = running.answer(prepared([prompt], PARAMS))[0]
    running.run(asyncio.sleep(0.5))  # pages are written in the background
    pid = running.service.pid
    found, seconds = running.run(failures(running.service, 32, signal.SIGKILL))
    assert all(isinstance(each, ApiError) and each.status == 503 for each in found), found
    assert seconds < 2.0
    assert running.service.num_running == 0
    with pytest.raises(ApiError, match="started again"):
        running.answer(prepared([prompt], PARAMS))
    assert running.service.state is State.RESTARTING
    running.ready()
    assert running.service.pid != pid
    again = running.answer(prepared([prompt], PARAMS))[0]
    assert first.cached_tokens == 0 and again.cached_tokens == (len(prompt) - 1) // 64 * 64 > 256
    assert again.token_ids == first.token_ids
    statistics = running.run(newest_statistics(running.service))
    assert (statistics.memory_hit_tokens, statistics.disk_hit_tokens) == (0, again.cached_tokens)
    assert statistics.disk_bytes > 0


def test_one_that_hangs_is_killed(running: RunningService) -> None:
    """Stopped by the system, it is alive and says nothing; without requests it may be silent."""
    running.ready()
    pid = running.service.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    running.run(asyncio.sleep(1.6))
    assert running.service.pid == pid, "nobody waited for it"
    os.kill(pid, signal.SIGCONT)
    found, seconds = running.run(failures(running.service, 2, signal.SIGSTOP))
    assert all(isinstance(each, ApiError) and each.status == 503 for each in found), found
    assert 0.5 < seconds < 4.0
    running.ready()
    assert running.service.pid != pid


def test_interrupts_of_the_terminal_do_not_reach_it(running: RunningService) -> None:
    running.ready()
    pid = running.service.pid
    assert pid is not None and os.getpgid(pid) != os.getpgid(0)
    os.kill(pid, signal.SIGINT)
    assert running.answer(prepared([(5, 6)], PARAMS))[0].finish_reason == "length"
    assert running.service.pid == pid


def test_what_cannot_start_says_why(trained_model: TrainedModel) -> None:
    running = RunningService(trained_model.folder, disk_cache_folder="/proc/nowhere")
    with pytest.raises(ValueError, match=r"disk_cache_folder: .*/proc/nowhere"):
        running.ready()
    assert running.service.state is State.FAILED
    with pytest.raises(ApiError, match="cannot run"):
        running.answer(prepared([(5, 6)], PARAMS))
    running.close()


FRONT = """
import asyncio, sys
from pathlib import Path
from abyssal.serve.engine.service import EngineService

async def main():
    service = await EngineService.start(Path(sys.argv[1]), "m", {"disk_cache": False})
    await service.ready()
    print(service.pid, flush=True)
    assert "torch" not in sys.modules
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_without_its_front_it_ends(trained_model: TrainedModel, tmp_path: Path) -> None:
    """However the front died; nothing of it is left, its socket's folder neither."""
    command = [sys.executable, "-c", FRONT, str(trained_model.folder)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as front:
        assert front.stdout is not None
        pid = int(front.stdout.readline())
        assert _lives(pid) and list(tmp_path.iterdir())
        front.kill()
    deadline = time.monotonic() + 10.0
    while _lives(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _lives(pid)
    assert not list(tmp_path.iterdir())


def test_stopping_fails_what_is_under_way_and_writes_what_is_to_be_kept(
    running: RunningService, trained_model: TrainedModel, disk: str
) -> None:
    """The last of its module: it ends the service."""
    running.ready()
    pid, prompt = running.service.pid, tuple(range(300, 600))

    async def stop() -> object:
        answer = asyncio.create_task(collect(running.service, prepared([(5, 6)], ENDLESS)))
        await collect(running.service, prepared([prompt], replace(PARAMS, max_tokens=1)))
        await running.service.stop()
        with pytest.raises(ApiError, match="stopping"):
            await collect(running.service, prepared([(5, 6)], PARAMS))
        return (await asyncio.gather(answer, return_exceptions=True))[0]

    found = running.run(stop())
    assert isinstance(found, ApiError) and found.status == 503 and "stopping" in found.message
    assert pid is not None and not _lives(pid)
    with LLM(trained_model.folder, config=EngineConfig(disk_cache_folder=disk)) as llm:
        assert llm.generate([prompt], replace(PARAMS, max_tokens=1))[0].cached_tokens == 256


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
