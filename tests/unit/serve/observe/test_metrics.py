"""Prometheus' text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from abyssal.serve.events import Usage
from abyssal.serve.observe.figures import MOST_MODELS, OTHER, Figures, Times
from abyssal.serve.observe.histogram import Histogram
from abyssal.serve.observe.metrics import Metrics
from abyssal.serve.observe.totals import EngineTotals
from abyssal.serve.observer import Outcome
from abyssal.serve.service import State
from tests.support.watched import StandIn

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scraped(metrics: Metrics) -> Samples:
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


def made(currency: str | None = "USD") -> tuple[Metrics, StandIn, Figures]:
    service, figures = StandIn(), Figures()
    return Metrics("tiny", service, EngineTotals(), figures, currency), service, figures


def test_the_engine_under_vllms_names() -> None:
    metrics, service, _ = made()
    service.change(running=3, waiting=2, used_pages=5, total_pages=20, preemptions=4, prompt_tokens=100)
    service.change(memory_hit_tokens=60, disk_hit_tokens=10, output_tokens=50, disk_bytes=9)
    service.change(drafted=(40, 20), accepted=(30, 5))
    samples = scraped(metrics)
    tiny = {"model_name": "tiny"}
    assert value(samples, "vllm:num_requests_running", **tiny) == 3
    assert value(samples, "vllm:num_requests_waiting", **tiny) == 2
    assert (
        value(samples, "vllm:kv_cache_usage_perc", **tiny)
        == value(samples, "vllm:gpu_cache_usage_perc", **tiny)
        == 0.25
    )
    assert value(samples, "vllm:num_preemptions_total", **tiny) == 4
    assert value(samples, "vllm:prefix_cache_queries_total", **tiny) == 100
    assert value(samples, "vllm:prefix_cache_hits_total", **tiny) == 70
    assert value(samples, "abyssal:prefix_cache_disk_hits_total", **tiny) == 10
    assert value(samples, "vllm:prompt_tokens_total", **tiny) == 100
    assert value(samples, "vllm:generation_tokens_total", **tiny) == 50
    assert value(samples, "vllm:spec_decode_num_drafts_total", **tiny) == 40
    assert value(samples, "vllm:spec_decode_num_draft_tokens_total", **tiny) == 60
    assert value(samples, "vllm:spec_decode_num_accepted_tokens_total", **tiny) == 35
    assert value(samples, "vllm:spec_decode_num_accepted_tokens_per_pos_total", position="1", **tiny) == 5
    assert value(samples, "abyssal:spec_decode_num_draft_tokens_per_pos_total", position="1", **tiny) == 20
    assert value(samples, "abyssal:disk_cache_bytes", **tiny) == 9


def test_a_restart_is_counted_and_counters_go_on() -> None:
    metrics, service, _ = made()
    service.change(output_tokens=50, steps=5)
    before = scraped(metrics)
    service.statistics, service.restarts, service.state = StandIn().statistics, 1, State.RESTARTING
    after = scraped(metrics)
    assert value(after, "vllm:generation_tokens_total", model_name="tiny") == 50
    assert value(before, "abyssal:engine_restarts_total") + 1 == value(after, "abyssal:engine_restarts_total")
    assert value(after, "abyssal:engine_state", state="restarting") == 1
    assert value(after, "abyssal:engine_state", state="ready") == 0


def test_requests_by_how_they_ended() -> None:
    metrics, _, figures = made()
    zero = scraped(metrics)
    assert value(zero, "vllm:request_success_total", model_name="tiny", finished_reason="stop") == 0
    model = figures.model("tiny")
    outcome = Outcome(200, usage=Usage(12, 5, 8, 2), cost=3_000_000_000, saved=500_000_000)
    figures.first_token(model, 0.05)
    figures.ended(model, "stop", outcome, Times(0.45, 0.05, 0.02))
    figures.ended(model, "cancelled", Outcome(200, disconnected=True, usage=Usage(12, 1, 0, 0)), Times(0.1, 0.05))
    figures.response("/v1/chat/completions", 200, 0.45)
    samples, tiny = scraped(metrics), {"model_name": "tiny"}
    assert value(samples, "vllm:request_success_total", finished_reason="stop", **tiny) == 1
    assert value(samples, "vllm:request_success_total", finished_reason="abort", **tiny) == 1
    assert value(samples, "vllm:time_to_first_token_seconds_bucket", le="0.06", **tiny) == 1
    assert value(samples, "vllm:time_to_first_token_seconds_bucket", le="0.04", **tiny) == 0
    assert value(samples, "vllm:e2e_request_latency_seconds_count", **tiny) == 2
    assert value(samples, "vllm:request_prompt_tokens_sum", **tiny) == 24
    assert value(samples, "vllm:request_generation_tokens_bucket", le="1.0", **tiny) == 1
    # Of one token there is nothing between: only the first request has such a time.
    assert value(samples, "vllm:request_time_per_output_token_seconds_count", **tiny) == 1
    assert value(samples, "vllm:request_time_per_output_token_seconds_sum", **tiny) == pytest.approx(0.1)
    # Only of the first is it known when the engine began with it.
    for part, seconds in (("queue", 0.02), ("prefill", 0.03), ("decode", 0.4)):
        assert value(samples, f"vllm:request_{part}_time_seconds_count", **tiny) == 1
        assert value(samples, f"vllm:request_{part}_time_seconds_sum", **tiny) == pytest.approx(seconds)
    assert value(samples, "abyssal:request_cached_tokens_total", **tiny) == 8
    assert value(samples, "abyssal:request_reasoning_tokens_total", **tiny) == 2
    assert value(samples, "abyssal:charged_money_total", currency="USD", **tiny) == 3
    assert value(samples, "abyssal:cache_saved_money_total", currency="USD", **tiny) == 0.5
    assert value(samples, "abyssal:http_responses_total", path="/v1/chat/completions", status="200") == 1
    assert value(samples, "abyssal:http_response_seconds_sum", path="/v1/chat/completions") == 0.45


def test_models_that_run_elsewhere_are_counted_by_their_usage() -> None:
    metrics, service, figures = made()
    service.change(prompt_tokens=100)
    figures.ended(figures.model("other/gpt"), "stop", Outcome(200, usage=Usage(7, 3, 0, 0)), Times(1.0))
    samples = scraped(metrics)
    assert value(samples, "vllm:prompt_tokens_total", model_name="other/gpt") == 7
    assert value(samples, "vllm:generation_tokens_total", model_name="other/gpt") == 3
    assert value(samples, "vllm:prompt_tokens_total", model_name="tiny") == 100


def test_invented_names_do_not_fill_the_memory() -> None:
    _, _, figures = made()
    for index in range(3 * MOST_MODELS):
        figures.model(f"elsewhere/{index}").cached_tokens += 1
    assert len(figures.models) == MOST_MODELS + 1
    assert figures.models[OTHER].cached_tokens == 2 * MOST_MODELS


def test_labels_are_escaped() -> None:
    metrics, _, figures = made()
    figures.ended(figures.model('a"b\\c\nd'), "stop", Outcome(200, usage=Usage(1, 1, 0, 0)), Times(1.0))
    assert value(scraped(metrics), "vllm:e2e_request_latency_seconds_count", model_name='a"b\\c\nd') == 1


def test_without_prices_there_is_no_money() -> None:
    metrics, _, _ = made(None)
    assert not [name for name, _ in scraped(metrics) if "money" in name]


def test_two_servers_in_a_process_share_nothing() -> None:
    (first, service, _), (second, _, _) = made(), made()
    service.change(output_tokens=5)
    assert value(scraped(first), "vllm:generation_tokens_total", model_name="tiny") == 5
    assert value(scraped(second), "vllm:generation_tokens_total", model_name="tiny") == 0


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 4)), max_size=40))
def test_a_histogram_counts_like_a_list(values: list[tuple[float, int]]) -> None:
    histogram = Histogram((0.5, 1.0, 10.0))
    for seconds, times in values:
        histogram.add(seconds, times)
    everything = [seconds for seconds, times in values for _ in range(times)]
    buckets = dict(histogram.buckets())
    for bound in histogram.bounds:
        assert buckets[str(bound)] == sum(seconds <= bound for seconds in everything)
    assert buckets["+Inf"] == histogram.count == len(everything)
    assert histogram.sum == pytest.approx(sum(everything))
