"""Processes that are killed during load: the engine's, which comes back; and the server's own, whose books agree."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from abyssal.serve.accounts.keys import KeyRing
from abyssal.serve.accounts.money import NANO
from abyssal.serve.accounts.store import Store
from abyssal.serve.accounts.usage import Ledger
from tests.support.live_server import LiveServer, live_server, start_server
from tests.support.streams import Heard, http_client, prompt, stream
from tests.support.trained_model import TrainedModel

CLIENTS = 12
LONG = {"model": "trained", "max_tokens": 800, "temperature": 0, "ignore_eos": True}
PRICES = 'currency = "USD"\n[models.trained]\nhit = 1.0\nmiss = 10.0\noutput = 100.0\n'


@pytest.fixture
def own_server(trained_model: TrainedModel, tmp_path: Path) -> Iterator[LiveServer]:
    folder = ("--disk-cache-folder", str(tmp_path / "cache"))
    with live_server(trained_model.folder, "--name", "trained", *folder) as running:
        yield running


def alive(pid: int) -> bool:
    """Zombies of somebody else's count as dead."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def cached(server: LiveServer, text: str) -> int:
    body = {"model": "trained", "prompt": text, "max_tokens": 2, "temperature": 0}
    return server.post("/v1/completions", body).json()["usage"]["prompt_cache_hit_tokens"]


async def until_all_write(server: LiveServer) -> None:
    for _ in range(600):
        if server.metric("vllm:num_requests_running") >= CLIENTS:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("they do not all run")


async def killed_during_load(server: LiveServer) -> tuple[float, list[Heard]]:
    """When the engine was killed, and what each client heard."""
    async with http_client(server, CLIENTS) as http:
        bodies = [{**LONG, "prompt": prompt(number)} for number in range(CLIENTS)]
        asking = [asyncio.create_task(stream(http, body)) for body in bodies]
        await until_all_write(server)
        assert server.engine_pid is not None
        os.kill(server.engine_pid, signal.SIGKILL)
        return time.monotonic(), await asyncio.gather(*asking)


def test_an_engine_that_is_killed_is_told_of_at_once_and_comes_back(own_server: LiveServer) -> None:
    old, seen = own_server.engine_pid, prompt(1000, words=400)
    assert cached(own_server, seen) == 0
    time.sleep(1)  # pages are written to disk in the background
    killed_at, heard = asyncio.run(killed_during_load(own_server))
    for each in heard:
        assert each.error and not each.complete, each
        assert each.ended_at - killed_at < 2, "a client waited for an engine that was gone"
        assert '"error"' in each.error, "the stream told of it in the API's shape"
    own_server.wait_ready(60)
    assert own_server.engine_pid not in (None, old)
    assert cached(own_server, seen) >= 64, "what was on disk is found again"


def asked_meanwhile(server: LiveServer, key: str, draw: random.Random) -> list[Heard]:
    """Requests of all lengths, until the server is killed at a random moment."""

    async def load() -> list[Heard]:
        async with http_client(server, CLIENTS) as http:

            async def ask_on(number: int) -> list[Heard]:
                heard: list[Heard] = []
                while not heard or not heard[-1].error:
                    body = {**LONG, "max_tokens": draw.choice([1, 5, 30]), "prompt": prompt(draw.randrange(1 << 30))}
                    heard.append(await stream(http, body, key=key))
                return heard

            asking = [asyncio.create_task(ask_on(number)) for number in range(CLIENTS)]
            await asyncio.sleep(0.3 + draw.random())
            server.process.kill()
            return [each for several in await asyncio.gather(*asking) for each in several]

    return asyncio.run(load())


def books_agree_after_kills(folder: Path, scratch: Path, kills: int) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    draw, prices, accounts = random.Random(seed), scratch / "prices.toml", scratch / "accounts.sqlite"
    prices.write_text(PRICES)
    with Store(accounts) as store:
        key = KeyRing(store).create("ada")
        account = KeyRing(store).find("ada").account_id
        Ledger(store).top_up(account, 100 * NANO)
    whole = 0
    for _ in range(kills):
        options = ("--name", "trained", "--keys", str(accounts), "--prices", str(prices), "--no-disk-cache")
        server = start_server(folder, *options)
        engine = server.engine_pid
        assert engine is not None
        heard = asked_meanwhile(server, key, draw)
        server.process.wait(10)
        end = time.monotonic() + 10
        while alive(engine) and time.monotonic() < end:
            time.sleep(0.02)
        assert not alive(engine), "the engine outlived its server"
        whole += sum(each.complete for each in heard)
    check_books(accounts, account, whole)


def check_books(accounts: Path, account: int, whole: int) -> None:
    """Whoever holds a whole answer has paid for it, and the balance is what the log adds up to."""
    with Store(accounts) as store:
        ledger = Ledger(store)
        assert ledger.disagreements() == []
        charges = store.rows("SELECT amount FROM log WHERE kind != 'topup'")
        balance = ledger.balance(account)
        assert 100 * NANO - balance.total == -sum(amount for (amount,) in charges) > 0
        assert balance.reserved == 0, "what a killed server had set aside is free again"
        assert len(charges) >= whole > 0


def test_the_books_agree_after_the_server_was_killed(trained_model: TrainedModel, tmp_path: Path) -> None:
    books_agree_after_kills(trained_model.folder, tmp_path, kills=1)


@pytest.mark.slow
def test_the_books_agree_after_many_kills(trained_model: TrainedModel, tmp_path: Path) -> None:
    books_agree_after_kills(trained_model.folder, tmp_path, kills=15)
