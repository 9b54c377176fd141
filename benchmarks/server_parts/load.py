"""Requests over HTTP by concurrency: so many clients, each of which waits for its answer before it asks again.

``miss``: no two prompts begin alike.  ``hit``: all of a prompt but its end was asked before, and its pages are in
memory.  Both have the same lengths.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from engine_parts.load import Job
from engine_parts.setting import Case, Part, Setting

from abyssal.spec.presets import preset

from .clients import closed_load, load_summary
from .models import servable_model
from .process import ServerProcess

PREFIX, TAIL, NEW = 512, 64, 64
"""Tokens of a prompt that a hit has seen, of the rest of it, and of an answer."""
CACHE_TOKENS = 1 << 18
"""More than all clients' requests take, so that what is measured is no eviction."""
WARM_UP = 4
WARM_UP_SEED = 1 << 20
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def lengths(setting: Setting) -> tuple[int, int, int]:
    """:data:`PREFIX`, :data:`TAIL` and :data:`NEW`."""
    return (64, 16, 8) if setting.smoke else (PREFIX, TAIL, NEW)


def cases(setting: Setting) -> list[Case]:
    return [{**case, "prefix": prefix} for case in setting.cases() for prefix in ("miss", "hit")]


def jobs(count: int, setting: Setting, vocab_size: int, hit: bool, seed: int) -> list[Job]:
    """Of random tokens; with ``hit``, of one beginning."""
    prefix, tail, new = lengths(setting)
    draw = random.Random(seed)

    def tokens(number: int) -> tuple[int, ...]:
        return tuple(draw.randrange(6, vocab_size) for _ in range(number))

    common = tokens(prefix)
    return [Job(n, 0.0, (common if hit else tokens(prefix)) + tokens(tail), new) for n in range(count)]


def serve_options(dtype: str, setting: Setting) -> list[str]:
    """Of ``abyssal serve``: all that waits may run."""
    most = max(64, *setting.batches)
    pages = ["--cache-tokens", str(CACHE_TOKENS), "--no-disk-cache"]
    return ["--dtype", DTYPE_NAMES[dtype], "--max-sequences", str(most), "--log-format", "json", *pages]


def measure(case: Case, setting: Setting) -> dict[str, Any]:
    """All concurrencies of one preset in one dtype, on one server."""
    folder, vocab_size = servable_model(case["preset"], setting.scratch), preset(case["preset"]).vocab_size
    hit = case["prefix"] == "hit"
    loads: list[dict[str, Any]] = []
    with ServerProcess(folder, *serve_options(case["dtype"], setting)) as server:
        closed_load(server.port, jobs(WARM_UP, setting, vocab_size, False, WARM_UP_SEED), WARM_UP)
        for clients in setting.batches:
            count = max(2 * clients, setting.requests if clients > 1 else setting.requests // 4)
            asked = jobs(count + 1, setting, vocab_size, hit, clients)
            if hit:
                closed_load(server.port, asked[-1:], 1)
            found = load_summary(closed_load(server.port, asked[:-1], clients))
            loads.append({"clients": clients, **found})
    prefix, tail, new = lengths(setting)
    return {**case, "prefix_tokens": prefix, "tail_tokens": tail, "new_tokens": new, "loads": loads}


def lines(row: dict[str, Any]) -> list[str]:
    """A table: what each concurrency got."""
    lengths = f"{row['prefix_tokens']} + {row['tail_tokens']} prompt and {row['new_tokens']} new tokens"
    head = f"{'clients':>8} {'requests/s':>11} {'out tok/s':>10} {'first token p50':>16} {'p99':>8}"
    text = [
        f"{row['preset']} {row['dtype']}, prefix {row['prefix']}: {lengths}",
        f"{head} {'a token p50':>12} {'p99':>8} {'gap p99':>9} {'cached':>7}",
    ]
    for found in row["loads"]:
        first, token, gap = found["first_token_seconds"], found["seconds_a_token"], found["gap_seconds"]
        text.append(
            f"{found['clients']:8d} {found['requests_per_second']:11.2f} {found['output_tokens_per_second']:10.1f} "
            f"{_milliseconds(first, 'p50'):13.1f} ms {_milliseconds(first, 'p99'):8.1f} "
            f"{_milliseconds(token, 'p50'):9.2f} ms {_milliseconds(token, 'p99'):8.2f} "
            f"{_milliseconds(gap, 'p99'):9.2f} {found['cached_share']:7.1%}"
        )
    return text


def _milliseconds(values: dict[str, float], share: str) -> float:
    return values[share] * 1e3


def concurrencies(rows: Sequence[dict[str, Any]]) -> list[int]:
    """Of all rows, in order."""
    return sorted({found["clients"] for row in rows for found in row["loads"]})


PART = Part("load", "requests over HTTP by concurrency", cases, measure, lines)
