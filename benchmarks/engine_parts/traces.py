"""Requests of published traces, scaled down to a small model.

Azure's (2023, conversations) has lengths and times; Mooncake's (FAST'25, conversations) also says which blocks of 512
tokens of each prompt are the same text, so that the reuse of prefixes can be replayed: each block becomes as many
pseudo-random tokens as the divided length leaves, the same ones wherever its number occurs.  Mooncake's first block is
common to all requests, and the second tells conversations apart, so it is cut down by whole conversations; taking the
first requests instead would leave hardly any reuse.

Lengths are divided; times are divided by whatever gives the wanted rate, so bursts stay bursts.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from .load import Job

BLOCK = 512
"""Tokens of a block of Mooncake's trace."""
DIVISORS = {"azure": 4, "mooncake": 8}
"""Of lengths: Azure's conversations become 290 tokens of prompt in the mean, Mooncake's 1,500, its blocks one page."""
FILES = {"azure": "azure2023_conv.csv", "mooncake": "mooncake_conversation.jsonl"}


@dataclass(frozen=True)
class TraceRequest:
    """One request as the trace has it."""

    at: float
    """Seconds after the trace's beginning."""
    prompt_tokens: int
    new_tokens: int
    blocks: tuple[int, ...] = ()
    """Numbers of the prompt's blocks; empty where nothing is known of its text."""


def read_azure(path: Path) -> list[TraceRequest]:
    """Requests in the order of their times."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]  # it has a digit beyond microseconds
    first = min(times)
    requests = [
        TraceRequest((time - first).total_seconds(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        for time, row in zip(times, rows, strict=True)
    ]
    return sorted(requests, key=lambda request: request.at)


def read_mooncake(path: Path) -> list[TraceRequest]:
    """Requests in the order of their times, with their blocks."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    requests = [
        TraceRequest(row["timestamp"] / 1000, row["input_length"], row["output_length"], tuple(row["hash_ids"]))
        for row in rows
    ]
    return sorted(requests, key=lambda request: request.at)


def read_trace(name: str, folder: Path) -> list[TraceRequest]:
    """The trace ``name`` in ``folder``.

    Raises:
        FileNotFoundError: it is not there.
    """
    return {"azure": read_azure, "mooncake": read_mooncake}[name](folder / FILES[name])


def scaled(request: TraceRequest, divisor: int) -> TraceRequest:
    """Lengths divided, at least one token each."""
    prompt, new = max(1, request.prompt_tokens // divisor), max(1, request.new_tokens // divisor)
    return replace(request, prompt_tokens=prompt, new_tokens=new)


def chosen(requests: Sequence[TraceRequest], count: int, longest: int, seed: int = 0) -> list[TraceRequest]:
    """About ``count`` requests that a model of ``longest`` tokens can serve, in the order of their times.

    Without blocks the first that fit; with blocks whole conversations by chance, those left out that do not fit.
    """

    def fits(request: TraceRequest) -> bool:
        return request.prompt_tokens + request.new_tokens <= longest

    if not any(request.blocks for request in requests):
        return [request for request in requests if fits(request)][:count]
    conversations: dict[tuple[int, ...], list[TraceRequest]] = {}
    for request in requests:
        conversations.setdefault(request.blocks[:2], []).append(request)
    whole = [each for each in conversations.values() if all(fits(request) for request in each)]
    random.Random(seed).shuffle(whole)
    taken: list[TraceRequest] = []
    for conversation in whole:
        if len(taken) + len(conversation) > count:
            continue
        taken += conversation
        if len(taken) == count:
            break
    return sorted(taken, key=lambda request: request.at)


def at_rate(requests: Sequence[TraceRequest], per_second: float) -> list[TraceRequest]:
    """The same in the same order, so compressed in time that ``per_second`` arrive in the mean, the first at 0."""
    first, last = requests[0].at, requests[-1].at
    factor = len(requests) / per_second / (last - first) if last > first else 0.0
    return [replace(request, at=(request.at - first) * factor) for request in requests]


def block_tokens(block: int, length: int, vocab_size: int) -> list[int]:
    """The text that stands for a block."""
    draw = random.Random(f"block {block}")
    return [draw.randrange(2, vocab_size) for _ in range(length)]


def prompt_of(request: TraceRequest, number: int, divisor: int, vocab_size: int) -> tuple[int, ...]:
    """Pseudo-random tokens of a scaled request: equal where blocks are, else a text of its own."""
    blocks = request.blocks or (-1 - number,)
    length = BLOCK // divisor if request.blocks else request.prompt_tokens
    tokens = [token for block in blocks for token in block_tokens(block, length, vocab_size)]
    return tuple(tokens[: request.prompt_tokens])


def jobs_of(requests: Iterable[TraceRequest], divisor: int, vocab_size: int) -> list[Job]:
    """What to send when."""
    return [
        Job(number, request.at, prompt_of(request, number, divisor, vocab_size), request.new_tokens)
        for number, request in enumerate(requests)
    ]
