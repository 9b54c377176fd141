"""Events wait without being lost, put out of order, or piling up."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abyssal.engine.messages import TokenLogprobs
from abyssal.serve.engine.mailbox import Mailbox
from abyssal.serve.events import EngineEvent
from abyssal.serve.protocol.errors import ApiError
from tests.support.engine_service import joined

TOKENS = 5


def event(choice: int, token: int, last: bool = False) -> EngineEvent:
    return EngineEvent(
        0,
        choice,
        f"<{token}>",
        (token,),
        (TokenLogprobs(token, -1.0, 1),),
        (None,) if token == 0 else None,
        "stop" if last else None,
        began=float(choice) if token == 0 else None,
    )


@given(st.lists(st.integers(-1, 2), max_size=40))
def test_whatever_is_taken_in_between(actions: list[int]) -> None:
    """Every choice's events, put together, are the same however late they are taken.  -1 takes one, any other puts the
    next of that choice."""
    box, found = Mailbox(3), {}
    left = {choice: 0 for choice in range(3)}

    async def read() -> None:
        for action in [*actions, *sorted([0, 1, 2] * TOKENS)]:
            if action in left:
                put(action)
            elif action == -1 and box._waiting:
                await take()
            assert len(box._waiting) <= 3
        while await take():
            pass

    def put(choice: int) -> None:
        box.put(event(choice, left[choice], left[choice] == TOKENS - 1))
        left[choice] += 1
        if left[choice] == TOKENS:
            del left[choice]

    async def take() -> bool:
        taken = await box.take()
        if taken is not None:
            before = found.get(taken.choice)
            found[taken.choice] = taken if before is None else joined(before, taken)
        return taken is not None

    asyncio.run(read())
    for choice in range(3):
        wanted = event(choice, 0)
        for token in range(1, TOKENS):
            wanted = joined(wanted, event(choice, token, token == TOKENS - 1))
        assert found[choice] == wanted


def test_an_error_comes_after_what_waits() -> None:
    async def read() -> list[EngineEvent]:
        box = Mailbox(2)
        box.put(event(0, 0))
        box.put(event(1, 0))
        box.put(event(0, 1))
        box.fail(ApiError(503, "gone"))
        box.fail(ApiError(500, "later"))
        taken = [await box.take(), await box.take()]
        with pytest.raises(ApiError, match="gone"):
            await box.take()
        return [each for each in taken if each is not None]

    assert [(each.choice, each.token_ids) for each in asyncio.run(read())] == [(0, (0, 1)), (1, (0,))]


def test_a_reader_that_waits_is_woken() -> None:
    async def read() -> tuple[object, object]:
        box = Mailbox(1)
        waiting = asyncio.create_task(box.take())
        await asyncio.sleep(0)
        box.put(event(0, 0, last=True))
        return await waiting, await box.take()

    assert asyncio.run(read()) == (event(0, 0, last=True), None)
