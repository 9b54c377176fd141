"""When a process is started again, after what pauses, and when it is given up."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from abyssal.engine.messages import SamplingParams
from abyssal.engine.wire import Add, Command, Delta, Failed, News, Ready, Report, Statistics
from abyssal.serve.engine import service as service_module
from abyssal.serve.engine.served import FolderText
from abyssal.serve.engine.service import EngineService
from abyssal.serve.engine.supervisor import Supervision
from abyssal.serve.protocol.errors import ApiError
from abyssal.serve.service import Origin, State
from tests.support import serving
from tests.support.engine_service import collect, prepared, until

READY = Ready(512, 400, (1,), "fp_1", 0, (1, 2))


class Scripted:
    """A process that says some reports, then waits to be let go, and ends with a status."""

    def __init__(self, reports: Sequence[Report], status: int | None) -> None:
        self.reports, self.status = reports, status
        self.last_lines = deque(["", "Killed: out of memory", ""])
        self.heard_at = float("inf")
        self.pid = 1
        self.sent: list[Command] = []
        self.handle: Callable[[Report], None] | None = None
        self.ended = asyncio.Event()
        self.loaded: bool | None = None

    async def listen(self, handle: Callable[[Report], None]) -> int:
        self.handle = handle
        for report in self.reports:
            handle(report)
        if self.status is None:
            self.status = 0
            await self.ended.wait()
        return self.status

    def send(self, command: Command) -> None:
        self.sent.append(command)

    async def stop(self, seconds: float, loaded: bool) -> None:
        self.loaded = loaded
        self.ended.set()


class Spawned:
    """Stands for ``EngineProcess``: each is the next of a script."""

    def __init__(self, *script: Scripted | OSError) -> None:
        self.script = list(script)
        self.options: list[Mapping[str, Any]] = []

    async def spawn(self, folder: Path, options: Mapping[str, Any]) -> Scripted:
        self.options.append(options)
        found = self.script.pop(0)
        if isinstance(found, OSError):
            raise found
        return found


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the supervisor paused; it does not wait for them."""
    found: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        if asyncio.current_task().get_name() == "engine-supervisor":  # pyright: ignore[reportOptionalMemberAccess]
            found.append(seconds)
            seconds = 0.0
        await sleep(seconds)

    served = serving.served("deepseek-v3")
    monkeypatch.setattr(service_module.asyncio, "sleep", note)
    monkeypatch.setattr(FolderText, "of", staticmethod(lambda folder: FolderText(served.tokenizer, served.chat)))
    return found


def run(
    monkeypatch: pytest.MonkeyPatch,
    spawned: Spawned,
    test: Callable[[EngineService], Any],
    supervision: Supervision | None = None,
) -> Any:
    monkeypatch.setattr(service_module, "EngineProcess", spawned)

    async def start() -> Any:
        service = await EngineService.start(Path("/models/small"), "small", {"num_drafts": 1}, supervision)
        try:
            async with asyncio.timeout(10):
                return await test(service)
        finally:
            await service.stop()

    return asyncio.run(start())


async def failed(service: EngineService) -> None:
    await until(lambda: service.state is State.FAILED)


def test_pauses_grow_until_it_is_given_up(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    """At once the first time; a process that cannot be started counts like one that dies."""
    dying = [Scripted([READY], -9), Scripted([READY], 1), OSError("no room"), Scripted([], 1), Scripted([READY], -6)]
    spawned = Spawned(*dying)
    run(monkeypatch, spawned, failed, Supervision(most_quick=5, longest_pause=1.5))
    assert pauses == [0.0, 0.5, 1.0, 1.5]
    assert not spawned.script and spawned.options == [{"num_drafts": 1}] * 5


def test_one_that_lived_for_long_is_started_at_once(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    spawned = Spawned(*(Scripted([READY], -9) for _ in range(9)), last := Scripted([READY], None))

    async def test(service: EngineService) -> None:
        await until(lambda: last.handle is not None)
        assert service.state is State.READY and service.restarts == 9

    run(monkeypatch, spawned, test, Supervision(quick=0.0, most_quick=2))
    assert pauses == [0.0] * 9
    assert last.loaded


@pytest.mark.parametrize(
    ("process", "problem"),
    [
        (Scripted([Failed("/models/small: holds no model")], 1), "/models/small: holds no model"),
        (Scripted([], -9), "the engine's process was ended by signal 9 (Killed: out of memory)"),
        (OSError("no room"), "the engine's process cannot be started: no room"),
    ],
)
def test_one_that_never_was_ready_is_not_started_again(
    process: Scripted | OSError, problem: str, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    async def test(service: EngineService) -> None:
        with pytest.raises(ValueError) as caught:
            await service.ready()
        assert str(caught.value) == service.problem == problem
        with pytest.raises(ApiError, match="log says why"):
            _ = service.served

    run(monkeypatch, Spawned(process), test)
    assert pauses == []


def test_what_dies_with_a_process(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    """Requests and a recording end with 503, statistics begin anew; what the dead one was sent is not repeated."""
    first, second = Scripted([READY, Statistics(running=3, steps=7)], None), Scripted([READY], None)

    async def test(service: EngineService) -> None:
        await service.ready()
        assert (service.statistics.steps, service.expert_layers) == (7, (1, 2))
        answer = asyncio.create_task(collect(service, prepared([(5,), (6,)], SamplingParams(n=2))))
        recording = asyncio.create_task(service.record(3, 5.0))
        await until(lambda: len(first.sent) == 3)
        assert first.handle is not None
        first.handle(News((Delta(0, text="a", token_ids=(7,)), Delta(99, text="of nobody"))))
        first.ended.set()
        for each in await asyncio.gather(answer, recording, return_exceptions=True):
            assert isinstance(each, ApiError) and each.status == 503
        await service.ready()
        assert service.statistics == Statistics() and service.num_running == 0
        other = asyncio.create_task(collect(service, prepared([(5,)], SamplingParams())))
        await until(lambda: second.sent)
        (sent,) = second.sent
        assert isinstance(sent, Add) and sent.request.request_id == 2
        assert second.handle is not None
        second.handle(News((Delta(2, text="b", token_ids=(8,), finish_reason="stop"),)))
        assert (await other)[0].text == "b"
        assert second.sent == [sent], "it had ended: there is nothing to cancel"

    run(monkeypatch, Spawned(first, second), test)


def test_stopping_before_it_is_ready(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    """It is not asked to, since it does not listen yet; and nobody waits for it."""
    loading = Scripted([], None)

    async def test(service: EngineService) -> None:
        await until(lambda: loading.handle is not None)
        waiting = asyncio.create_task(service.ready())
        with pytest.raises(ApiError, match="being loaded"):
            await collect(service, prepared([(5,)], SamplingParams()), Origin("1"))
        await service.stop()
        assert loading.loaded is False and service.state is State.FAILED
        with pytest.raises(ValueError, match="stopped"):
            await waiting

    run(monkeypatch, Spawned(loading), test)
