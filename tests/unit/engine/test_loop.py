"""The loop of an engine's process, with an engine of this one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import zmq

from abyssal.engine.config import EngineConfig
from abyssal.engine.core import Engine
from abyssal.engine.loop import EngineLoop
from abyssal.engine.messages import Request, SamplingParams, StructuredOutput
from abyssal.engine.meter import EngineMeter
from abyssal.engine.wire import Add, Cancel, Command, Delta, News, Report, Statistics, Stop
from tests.support.trained_model import TrainedModel

PARAMS = SamplingParams(temperature=0.8, seed=1, max_tokens=6, ignore_eos=True)


class Front:
    """The other end of an engine's socket."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        self._socket.rcvtimeo = 10_000
        self._socket.bind("inproc://engine")
        theirs: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        theirs.connect("inproc://engine")
        self.loop = EngineLoop(engine, EngineMeter(engine), theirs)
        self._theirs = theirs
        self._thread = threading.Thread(target=self.loop.run)

    def send(self, *commands: Command | bytes) -> None:
        """All of them before the loop looks, if it does not run yet."""
        for command in commands:
            self._socket.send(command if isinstance(command, bytes) else msgspec.msgpack.encode(command))
        if not self._thread.is_alive():
            self._thread.start()

    def reports(self, seconds: float = 20.0) -> Iterator[Report]:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            yield msgspec.msgpack.decode(self._socket.recv(), type=Report)  # pyright: ignore[reportArgumentType]

    def ends(self, count: int = 1) -> list[Delta]:
        """The deltas that end the next so many completions."""
        found: list[Delta] = []
        for report in self.reports():
            if isinstance(report, News):
                found += [delta for delta in report.deltas if delta.finish_reason is not None]
            if len(found) >= count:
                return found
        raise TimeoutError(f"{len(found)} ends in 20 s, not {count}")

    def close(self) -> None:
        self.send(Stop())
        self._thread.join()
        for socket in (self._socket, self._theirs):
            socket.close(0)
        self._context.term()


@pytest.fixture
def front(trained_model: TrainedModel) -> Iterator[Front]:
    config = EngineConfig(cache_tokens=1024, prefix_cache=False)
    front = Front(Engine(trained_model.model, trained_model.tokenizer, config))
    yield front
    front.close()


def request(number: int, **fields: Any) -> Add:
    return Add(Request(number, (5, 6, 7), PARAMS, **fields))


def test_a_request_cancelled_before_any_step_is_told_of(front: Front) -> None:
    """Nothing is under way then, and its end is news all the same."""
    front.send(request(1), Cancel((1, 77)))
    (end,) = front.ends()
    assert (end.request_id, end.token_ids, end.finish_reason) == (1, (), "cancelled")
    front.send(request(1))
    assert front.ends()[0].finish_reason == "length", "its number is free again"


def test_what_is_no_command_is_passed_over_and_refused(front: Front) -> None:
    """The process goes on: it is everybody's."""
    wrong = msgspec.msgpack.encode({"type": "Add", "request": {"request_id": 3, "prompt_ids": [1.5], "params": {}}})
    unfit = msgspec.msgpack.encode(
        {"type": "Add", "request": {"request_id": 4, "prompt_ids": [1], "params": {"temperature": -1.0}}}
    )
    front.send(b"", b"\xc1junk", msgspec.msgpack.encode({"type": "Dance"}), wrong, unfit, request(5))
    ends = front.ends(3)
    assert [(end.request_id, end.refused) for end in ends] == [(3, True), (4, True), (5, False)]
    assert "prompt_ids" in ends[0].error and "temperature" in ends[1].error
    assert ends[2].finish_reason == "length"


def test_what_a_request_breaks_is_its_own(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is no refusal, while it is queued, or in the step that others are in."""
    add, launch = front.engine.add, front.engine._runner.launch

    def broken_add(request: Request, *_: Any) -> None:
        if request.request_id == 1:
            raise RuntimeError("cannot be")
        add(request)

    def broken_launch(plan: Any) -> Any:
        monkeypatch.setattr(front.engine._runner, "launch", launch)
        raise MemoryError("no room")

    monkeypatch.setattr(front.engine, "add", broken_add)
    monkeypatch.setattr(front.engine._runner, "launch", broken_launch)
    front.send(request(1), request(2), request(3))
    first, *others = front.ends(3)
    assert (first.request_id, first.refused) == (1, False) and "RuntimeError cannot be" in first.error
    assert [(end.request_id, end.finish_reason) for end in others] == [(2, "error"), (3, "error")]
    assert all("no room" in end.error and not end.refused for end in others)
    front.send(request(4))
    assert front.ends()[0].finish_reason == "length"


def test_statistics_come_at_once_when_it_is_idle(front: Front) -> None:
    front.send(request(1))
    ended = False
    for report in front.reports():
        ended = ended or (isinstance(report, News) and report.deltas[0].finish_reason == "length")
        if ended and isinstance(report, Statistics):
            assert (report.running, report.waiting, report.used_pages, report.output_tokens) == (0, 0, 0, 6)
            return
    pytest.fail("it never came")


def formed(number: int, value: str, **fields: Any) -> Add:
    params = replace(PARAMS, structured=StructuredOutput("regex", value), max_tokens=20, ignore_eos=False, **fields)
    return Add(Request(number, (5, 6, 7), params))


def test_nobody_waits_for_a_form(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others begin, run and end meanwhile; a request that is cancelled before its form is there never begins."""
    compiled, compile = threading.Event(), front.engine.compile

    def slow(request: Request) -> Any:
        assert request.params.structured is None or compiled.wait(20)
        return compile(request)

    monkeypatch.setattr(front.engine, "compile", slow)
    front.send(formed(0, "a{3}"), formed(1, "b{3}", n=2), request(2), Cancel((1,)))
    ends = front.ends(3)
    assert sorted((end.request_id, end.index, end.finish_reason) for end in ends) == [
        (1, 0, "cancelled"),
        (1, 1, "cancelled"),
        (2, 0, "length"),
    ]
    compiled.set()
    front.send(formed(3, "c("), request(4))
    last = {end.request_id: end for end in front.ends(3)}
    assert last[0].finish_reason == "stop" and last[4].finish_reason == "length"
    assert last[3].refused and "structured" in last[3].error
