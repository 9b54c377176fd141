"""Many clients at once, half of which leave at random: nothing of theirs stays behind, and nobody else notices."""

from __future__ import annotations

import asyncio
import random
import time

import pytest

from tests.support.live_server import LiveServer, open_handles
from tests.support.streams import Heard, http_client, prompt, stream

NEW = 40


def body(number: int) -> dict[str, object]:
    return {"model": "trained", "prompt": prompt(number), "max_tokens": NEW, "temperature": 0, "ignore_eos": True}


async def under_load(server: LiveServer, clients: int, draw: random.Random) -> tuple[list[Heard], list[int]]:
    """What each client heard, and which of them left."""
    leaving = draw.sample(range(clients), clients // 2)
    leaves = {number: draw.choice([1, 1, 2, 3, 5, 8, 12]) for number in leaving}
    async with http_client(server, clients) as http:
        heard = await asyncio.gather(*(stream(http, body(n), leaves.get(n)) for n in range(clients)))
    return heard, leaving


def settled(server: LiveServer, handles: int) -> None:
    """Wait until the server holds nothing any more."""
    assert server.engine_pid is not None
    pids = [server.pid, server.engine_pid]
    end = time.monotonic() + 10
    while (left := held(server, pids, handles)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left, f"{left} are left"


def held(server: LiveServer, pids: list[int], handles: int) -> dict[str, float]:
    """What is not as it was."""
    now = {
        "running": server.metric("vllm:num_requests_running"),
        "waiting": server.metric("vllm:num_requests_waiting"),
        "share of the pages": server.metric("vllm:kv_cache_usage_perc"),
        "file handles": max(0, open_handles(pids) - handles),
    }
    return {name: value for name, value in now.items() if value}


def load_leaves_nothing(server: LiveServer, clients: int) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    assert server.engine_pid is not None
    asyncio.run(under_load(server, 8, random.Random(seed)))  # files that are opened once and kept
    server.metric("vllm:num_requests_running")
    time.sleep(0.3)
    handles = open_handles([server.pid, server.engine_pid])
    heard, leaving = asyncio.run(under_load(server, clients, random.Random(seed)))
    for number, each in enumerate(heard):
        assert each.status == 200 and not each.error, each
        assert each.complete or number in leaving, each
    assert sum(each.complete for each in heard) < clients, "nobody left"
    settled(server, handles)
    staying = [number for number in range(clients) if number not in leaving]
    again = asyncio.run(alone(server, staying[:4]))
    assert [each.text for each in again] == [heard[number].text for number in staying[:4]], "somebody was disturbed"


async def alone(server: LiveServer, numbers: list[int]) -> list[Heard]:
    async with http_client(server, 1) as http:
        return [await stream(http, body(number)) for number in numbers]


def test_40_clients(server: LiveServer) -> None:
    load_leaves_nothing(server, 40)


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(3))
def test_200_clients(server: LiveServer, turn: int) -> None:
    load_leaves_nothing(server, 200)
