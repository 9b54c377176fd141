"""What an operator sees of a real server: metrics, the board, a trace of the engine's steps, the page."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.support.live_server import LiveServer

Samples = dict[tuple[str, str], float]


def scraped(server: LiveServer) -> Samples:
    """By name and the value of the label that tells two of a name apart; sums over any other."""
    text = httpx.get(f"{server.url}/metrics").text
    told = ("finished_reason", "position", "state", "path")
    samples: Samples = {}
    for one in (one for family in text_string_to_metric_families(text) for one in family.samples):
        if "le" not in one.labels:
            key = one.name, next((one.labels[label] for label in told if label in one.labels), "")
            samples[key] = samples.get(key, 0.0) + one.value
    return samples


def complete(server: LiveServer, prompt: str, **more: Any) -> dict[str, Any]:
    body = {"model": server.name, "prompt": prompt, "temperature": 0, **more}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_metrics_count_what_was_answered(server: LiveServer) -> None:
    prompt = "def metrics(self):\n    return self._counted\n\n" * 8
    before = scraped(server)
    usages = [complete(server, prompt, max_tokens=24)["usage"] for _ in range(2)]
    after = scraped(server)
    for _ in range(40):  # the engine tells of itself a few times a second
        if after["vllm:generation_tokens_total", ""] - before["vllm:generation_tokens_total", ""] >= 48:
            break
        threading.Event().wait(0.1)
        after = scraped(server)
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    tokens = sum(usage["prompt_tokens"] for usage in usages)
    assert usages[1]["prompt_cache_hit_tokens"] > 0
    assert grown["vllm:prompt_tokens_total", ""] == grown["vllm:prefix_cache_queries_total", ""] == tokens
    assert grown["vllm:prefix_cache_hits_total", ""] == sum(usage["prompt_cache_hit_tokens"] for usage in usages)
    assert grown["vllm:generation_tokens_total", ""] == 48
    assert grown["vllm:request_success_total", "length"] == 2
    assert grown["vllm:time_to_first_token_seconds_count", ""] == 2
    assert grown["vllm:inter_token_latency_seconds_count", ""] == 46
    assert grown["vllm:request_generation_tokens_sum", ""] == 48
    parts = [grown[f"vllm:request_{part}_time_seconds_sum", ""] for part in ("queue", "prefill", "decode")]
    assert grown["vllm:request_queue_time_seconds_count", ""] == 2 and min(parts) > 0
    assert abs(sum(parts) - grown["vllm:e2e_request_latency_seconds_sum", ""]) < 1e-6
    assert grown["abyssal:http_responses_total", "/v1/completions"] == 2
    assert 0 < grown["vllm:time_to_first_token_seconds_sum", ""] < grown["vllm:e2e_request_latency_seconds_sum", ""]
    assert after["abyssal:engine_state", "ready"] == 1 and after["abyssal:pages", ""] > 0


def test_the_board_knows_the_model_and_its_experts(server: LiveServer) -> None:
    complete(server, "import os\n", max_tokens=40)
    told = httpx.get(f"{server.url}/board").json()
    assert (told["model"], told["state"]) == (server.name, "ready")
    assert told["now"]["total_pages"] > 0
    assert told["experts"]["layers"] == [1, 2]
    for row in told["experts"]["loads"]:
        assert len(row) == 8 and abs(sum(row) / 8 - 1) < 0.02
    page = httpx.get(f"{server.url}/")
    assert page.status_code == 200 and "script-src 'self'" in page.headers["content-security-policy"]


def test_a_trace_has_the_steps_that_were_taken(server: LiveServer) -> None:
    working = threading.Thread(target=complete, args=(server, "class Trace:\n"), kwargs={"max_tokens": 400})
    working.start()
    answer = httpx.post(f"{server.url}/debug/trace", params={"steps": 12, "seconds": 20}, timeout=60)
    working.join()
    events = json.loads(answer.content)["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    steps = [event for event in slices if event["name"] == "step"]
    assert len(steps) == 12
    assert {"plan", "launch", "collect", "update"} <= {event["name"] for event in slices}
    for step in steps:
        end = step["ts"] + step["dur"]
        inside = [event for event in slices if event is not step and step["ts"] <= event["ts"] < end]
        assert inside and sum(event["dur"] for event in inside) <= step["dur"] * 1.01 + 1
