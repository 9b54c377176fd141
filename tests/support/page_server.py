"""A server for tests of the page: real HTTP, a script for a model, and statistics as a busy engine would have them.

python -m tests.support.page_server --port 8000      to look at the page without a model
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import socket
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn

from abyssal.engine.wire import Statistics
from abyssal.serve.accounts.desk import Desk
from abyssal.serve.app import create_app
from abyssal.serve.events import EngineEvent, Prepared
from abyssal.serve.http.settings import HttpSettings
from abyssal.serve.observe.observability import Observability
from abyssal.serve.observer import Arrival, Outcome
from abyssal.serve.protocol.errors import ApiError
from abyssal.serve.service import Origin
from abyssal.serve.web.pages import page_router
from abyssal.text.reasoning import THINK_END
from tests.support.scripted_service import ScriptedService, Step
from tests.support.serving import MODEL, served

FAMILY = "deepseek-r1"
LAYERS, EXPERTS = 26, 64

REASONING = """\
They ask how attention can be cached cheaply. Two facts matter: keys and values are projections of one latent vector, \
and the projection can be moved to the other side of the product.

So the cache may hold the latent alone. Let me check the sizes: 512 for the latent and 64 for the rotary part."""
ANSWER = """\
Multi-head latent attention keeps **one small vector a token** instead of keys and values for every head.

1. A token's hidden state is compressed to a latent of 512 values.
2. Keys and values are linear functions of it, so `W_UK` can be absorbed into the query.
3. Only the rotary part needs values of its own: 64 more.

```python
def scores(query, latent, rotary):
    # the cache is read once, for all heads
    return query.latent @ latent.T + query.rotary @ rotary.T
```

| | values a token |
|---|--:|
| MHA, 128 heads | 32,768 |
| MLA | 576 |

That is what the [paper](https://arxiv.org/abs/2412.19437) calls the KV cache of V3."""
NASTY = (
    '<img src=x onerror="document.title=\'broken\'"> <script>document.title="broken"</script> '
    "[x](javascript:alert(1)) **safe**"
)


def pieces(text: str) -> list[str]:
    """Words with the space before them, as tokens have."""
    found = [""]
    for char in text:
        if char in " \n" and found[-1].strip():
            found.append("")
        found[-1] += char
    return found


def answer(prepared: Prepared, pause: float) -> list[Step]:
    """By what the prompt says: ``nasty``, ``long``, ``break``, or the answer about attention."""
    model = served(FAMILY)
    asked = model.tokenizer.decode(prepared.prompts[0])
    asked = asked[asked.rfind("User") :]
    end = model.tokenizer.token_id(THINK_END)
    text = NASTY if "nasty" in asked else ANSWER
    steps: list[Step] = [max(pause, 0.02)]
    for piece in pieces(REASONING):
        steps += [EngineEvent(text=piece, token_ids=(7,), cached_tokens=len(prepared.prompts[0]) // 2), pause]
    steps.append(EngineEvent(text=THINK_END, token_ids=(end,)))
    for piece in pieces("\n\n" + (text * 40 if "long" in asked else text)):
        steps += [EngineEvent(text=piece, token_ids=(7,)), pause]
    end_of_it = ApiError(500, "The script breaks off here") if "break" in asked else EngineEvent(finish_reason="stop")
    return [*steps, end_of_it]


@dataclass
class BusyService(ScriptedService):
    """Its statistics wander."""

    pause: float = 0.02
    restarts: int = 0
    expert_layers: Sequence[int] = field(default_factory=lambda: tuple(range(1, LAYERS + 1)))

    def __post_init__(self) -> None:
        super().__init__(lambda prepared: answer(prepared, self.pause))
        self._chance = random.Random(8)
        self._skew = [[self._chance.gauss(0, 0.55) for _ in range(EXPERTS)] for _ in range(LAYERS)]
        self._second = 0

    def second(self) -> None:
        """One passes."""
        self._second += 1
        now, at = self.statistics, self._second
        wave = 1 + 0.35 * math.sin(at / 40) + 0.15 * math.sin(at / 9) + self._chance.gauss(0, 0.04)
        output, prompt = max(0, int(900 * wave)), max(0, int(2400 * wave * self._chance.uniform(0.6, 1.3)))
        memory, disk = int(prompt * 0.52), int(prompt * self._chance.uniform(0.04, 0.16))
        drafted = (int(output * 0.55), int(output * 0.5))
        accepted = (int(drafted[0] * 0.86), int(drafted[1] * 0.58))
        self.statistics = Statistics(
            running=max(1, round(28 * wave)),
            waiting=max(0, round(9 * (wave - 1.1) * 3)),
            used_pages=int(4096 * min(0.97, 0.52 * wave)),
            total_pages=4096,
            preemptions=now.preemptions + (self._chance.random() < 0.02),
            steps=now.steps + 31,
            step_seconds=now.step_seconds + 0.93,
            prompt_tokens=now.prompt_tokens + prompt,
            memory_hit_tokens=now.memory_hit_tokens + memory,
            disk_hit_tokens=now.disk_hit_tokens + disk,
            output_tokens=now.output_tokens + output,
            drafted=_added(now.drafted, drafted),
            accepted=_added(now.accepted, accepted),
            expert_loads=tuple(map(self._loads, self._skew)),
            disk_bytes=3_700_000_000,
        )

    def _loads(self, row: Sequence[float]) -> tuple[float, ...]:
        weights = [math.exp(skew + self._chance.gauss(0, 0.05)) for skew in row]
        return tuple(weight / sum(weights) for weight in weights)

    async def run(self, prepared: Prepared, origin: Origin) -> AsyncGenerator[EngineEvent, None]:
        async for event in super().run(prepared, origin):
            yield event


def _added(before: tuple[int, ...], more: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(before or (0,) * len(more), more, strict=True))


class _Ticks:
    """A clock that the history of a server before its start is made with."""

    def __init__(self) -> None:
        self.shift = 0.0

    def __call__(self) -> float:
        import time

        return time.monotonic() + self.shift

    def date(self) -> float:
        import time

        return time.time() + self.shift


def _lived(service: BusyService, minutes: int, currency: str | None) -> Observability:
    """A server that has run for some minutes."""
    ticks = _Ticks()
    ticks.shift = -60.0 * minutes
    seen = Observability(MODEL, service, currency, clock=ticks.date, ticks=ticks)
    chance = random.Random(4)
    for _ in range(60 * minutes):
        ticks.shift += 1.0
        service.second()
        for _ in range(3):
            _request(seen, ticks, chance)
        seen.board.tick()
    ticks.shift = 0.0
    return seen


def _request(seen: Observability, ticks: _Ticks, chance: random.Random) -> None:
    model = seen.observer.figures.model(MODEL)
    first = chance.uniform(0.08, 0.4)
    seen.observer.figures.first_token(model, first)
    model.between_tokens.add(chance.uniform(0.018, 0.03), 40)
    watch = seen.observer.begin(Arrival("req", "/v1/chat/completions", ticks() - first))
    watch.end(Outcome(200))
    model.finished["stop"] += 1
    model.saved += chance.randrange(400_000)


@contextmanager
def page_server(
    port: int = 0, minutes: int = 0, pause: float = 0.001, currency: str | None = "USD", desk: Desk | None = None
) -> Iterator[tuple[str, BusyService]]:
    """Its address, and the service behind it.

    Args:
        minutes: that it seems to have run for.
        pause: seconds between tokens.
    """
    service = BusyService(pause=pause)
    seen = _lived(service, minutes, currency)
    app = create_app(
        HttpSettings(MODEL),
        service,
        lambda: served(FAMILY),
        desk,
        observer=seen.observer,
        routers=[page_router(), seen.router()],
    )
    listening = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))

    async def wander() -> None:
        while minutes:
            await asyncio.sleep(1)
            service.second()

    async def serve() -> None:
        async with seen.running():
            wandering = asyncio.create_task(wander())
            await server.serve([listening])
            wandering.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join(10)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8000)
    with page_server(parser.parse_args().port, minutes=7, pause=0.03) as (address, _):
        print(address)
        threading.Event().wait()
