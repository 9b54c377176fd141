"""The offline API in a process of its own: ``python -m server_parts.offline_process '{"folder": ...}'`` reads batches
as lines of JSON, and answers each with its tokens a second."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from support.peer import DTYPES

from abyssal.engine.config import EngineConfig
from abyssal.engine.llm import LLM
from abyssal.engine.messages import SamplingParams

from .load import CACHE_TOKENS


def answered(llm: LLM, batch: list[list[Any]]) -> dict[str, float]:
    """Tokens a second: in the engine's steps, of the process's time on a processor, and of the whole call."""
    params = [SamplingParams(temperature=0, max_tokens=new, ignore_eos=True) for _, new in batch]
    spent, step = [0.0], llm.engine.step

    def timed() -> Any:
        start = time.perf_counter()
        try:
            return step()
        finally:
            spent[0] += time.perf_counter() - start

    llm.engine.step = timed  # pyright: ignore[reportAttributeAccessIssue]
    start, used = time.perf_counter(), time.process_time()
    outputs = llm.generate([prompt for prompt, _ in batch], params)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    llm.engine.step = step
    assert all(output.error is None for output in outputs), [output.error for output in outputs]
    tokens = sum(len(output.token_ids) for output in outputs)
    return {"engine": tokens / spent[0], "processor": tokens / used, "whole": tokens / seconds}


def main() -> None:
    request = json.loads(sys.argv[1])
    most = request["max_sequences"]
    config = EngineConfig(
        token_budget=max(512, most), max_sequences=most, cache_tokens=CACHE_TOKENS, num_drafts="auto", disk_cache=False
    )
    with LLM(request["folder"], dtype=DTYPES[request["dtype"]], config=config) as llm:
        for line in sys.stdin:
            print(json.dumps(answered(llm, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
