"""One life of an engine with a disk cache: ``python -m engine_parts.disk_process '{"...": ...}'``, answers in JSON.

It loads the model, serves a short request to be warm, and then either computes a long prompt and keeps its pages
(``cold``, and once more from memory), or finds what an earlier life left on disk (``disk``).  A life that ends has
written its pages.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from support.peer import DTYPES

from abyssal.engine.config import EngineConfig
from abyssal.engine.llm import LLM
from abyssal.engine.messages import SamplingParams

from .page_cache import drop, in_memory, read_rate, segment_files
from .setting import random_prompts

GREEDY = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
WARM_UP = 128


def timed(llm: LLM, prompt: list[int]) -> dict[str, Any]:
    """Seconds until the first token, and how much of the prompt was cached."""
    start = time.perf_counter()
    output = llm.generate([prompt], GREEDY)[0]
    seconds = time.perf_counter() - start
    assert output.error is None, output.error
    return {"seconds": seconds, "cached_tokens": output.cached_tokens, "token": output.token_ids[0]}


def life(request: dict[str, Any]) -> dict[str, Any]:
    """What one process finds out; ``request`` names folder, dtype, cache, prefix, tail, seed and action."""
    start = time.perf_counter()
    config = EngineConfig(disk_cache_folder=request["cache"])
    with LLM(request["folder"], dtype=DTYPES[request["dtype"]], config=config) as llm:
        found: dict[str, Any] = {"load_seconds": time.perf_counter() - start}
        assert llm.stored is not None and llm.stored.wait(60), "the disk cache did not open"
        found["open_seconds"] = time.perf_counter() - start
        return {**found, **_served(llm, request)}


def _served(llm: LLM, request: dict[str, Any]) -> dict[str, Any]:
    """What is asked of a life, once it is ready."""
    vocab_size, seed = llm.model.spec.vocab_size, request["seed"]
    found: dict[str, Any] = {}
    prefix = random_prompts(1, request["prefix"], vocab_size, seed)[0].tolist()
    warm, first, second = (
        random_prompts(1, length, vocab_size, seed + number)[0].tolist()
        for number, length in ((1, WARM_UP), (2, request["tail"]), (3, request["tail"]))
    )
    if request["action"] == "write":
        timed(llm, warm)
        found["cold"] = timed(llm, prefix + first)
        found["memory"] = timed(llm, prefix + second)
        return found
    timed(llm, list(reversed(warm)))  # not what the life before left
    files = segment_files(Path(request["cache"]))
    drop(files)
    found["files_in_memory"] = [in_memory(path) for path in files]
    found["disk"] = timed(llm, prefix + second)
    drop(files)
    found["bytes_per_second"] = read_rate(files)
    found["bytes_per_second_again"] = read_rate(files)
    found["file_bytes"] = sum(path.stat().st_size for path in files)
    return found


if __name__ == "__main__":
    print(json.dumps(life(json.loads(sys.argv[1]))))
