"""``/metrics``: Prometheus' text, with vLLM's names where the meaning is the same.

Dashboards and autoscalers made for vLLM then work here.  Names that vLLM has given up but that are still asked for
(``gpu_cache_usage_perc``, ``time_per_output_token_seconds``) are answered too.  What vLLM does not have is
``abyssal:*``.  ``prefix_cache_hits`` are tokens found in memory or read from disk, as they all were not computed;
``abyssal:prefix_cache_disk_hits`` are those from disk.

Numbers are read when they are asked for: nothing is counted twice, and a registry belongs to one server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from abyssal.engine.wire import Statistics
from abyssal.serve.observe.figures import REASONS, Figures, ModelFigures
from abyssal.serve.observe.histogram import Histogram
from abyssal.serve.observe.totals import EngineTotals
from abyssal.serve.observe.watched import Watched
from abyssal.serve.service import State

NANO = 1_000_000_000

_GAUGES: tuple[tuple[str, str, Callable[[Statistics], float]], ...] = (
    ("vllm:num_requests_running", "Sequences that hold pages.", lambda now: now.running),
    ("vllm:num_requests_waiting", "Sequences in the queue.", lambda now: now.waiting),
    ("vllm:kv_cache_usage_perc", "Share of the pages in use, from 0 to 1.", lambda now: _usage(now)),
    ("vllm:gpu_cache_usage_perc", "The old name of vllm:kv_cache_usage_perc.", lambda now: _usage(now)),
    ("abyssal:pages", "Pages of the context cache in memory.", lambda now: now.total_pages),
    ("abyssal:disk_cache_bytes", "Of the context cache on disk.", lambda now: now.disk_bytes),
)
_COUNTERS: tuple[tuple[str, str, Callable[[Statistics], float]], ...] = (
    ("vllm:num_preemptions", "Sequences that gave their pages up to others.", lambda now: now.preemptions),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the context cache.", lambda now: now.prompt_tokens),
    (
        "vllm:prefix_cache_hits",
        "Prompt tokens found in the context cache.",
        lambda now: now.memory_hit_tokens + now.disk_hit_tokens,
    ),
    ("abyssal:prefix_cache_disk_hits", "Of those found, read from disk.", lambda now: now.disk_hit_tokens),
    ("vllm:prompt_tokens", "Prompt tokens, cached ones included.", lambda now: now.prompt_tokens),
    ("vllm:generation_tokens", "Output tokens.", lambda now: now.output_tokens),
    ("abyssal:engine_steps", "Steps of the engine.", lambda now: now.steps),
    ("abyssal:engine_step_seconds", "Spent in steps.", lambda now: now.step_seconds),
    ("vllm:spec_decode_num_drafts", "Steps in which drafts were verified.", lambda now: sum(now.drafted[:1])),
    ("vllm:spec_decode_num_draft_tokens", "Drafts verified.", lambda now: sum(now.drafted)),
    ("vllm:spec_decode_num_accepted_tokens", "Drafts accepted.", lambda now: sum(now.accepted)),
)
_OF_REQUESTS: dict[str, Callable[[ModelFigures], Histogram]] = {
    "vllm:prompt_tokens": lambda model: model.prompt_tokens,
    "vllm:generation_tokens": lambda model: model.output_tokens,
}
"""Counters of the engine that models which run elsewhere have as well: by their requests' usage."""
_HISTOGRAMS: tuple[tuple[str, str, Callable[[ModelFigures], Histogram]], ...] = (
    ("vllm:time_to_first_token_seconds", "From a request's arrival.", lambda model: model.first_token),
    ("vllm:inter_token_latency_seconds", "Between tokens of an answer.", lambda model: model.between_tokens),
    (
        "vllm:time_per_output_token_seconds",
        "The old name of vllm:inter_token_latency_seconds.",
        lambda model: model.between_tokens,
    ),
    (
        "vllm:request_time_per_output_token_seconds",
        "A request's mean between tokens.",
        lambda model: model.per_output_token,
    ),
    ("vllm:e2e_request_latency_seconds", "From a request's arrival to its end.", lambda model: model.whole),
    ("vllm:request_queue_time_seconds", "Before the engine began with a request.", lambda model: model.queue),
    ("vllm:request_prefill_time_seconds", "From there to its first token.", lambda model: model.prefill),
    ("vllm:request_decode_time_seconds", "From there to its end.", lambda model: model.decode),
    ("vllm:request_prompt_tokens", "Of a request.", lambda model: model.prompt_tokens),
    ("vllm:request_generation_tokens", "Of a request, all answers together.", lambda model: model.output_tokens),
)


class Metrics(Collector):
    """Of one server.

    Args:
        model: that the engine runs, as it is served.
        currency: of prices; None where every price is 0.
    """

    def __init__(
        self, model: str, service: Watched, totals: EngineTotals, figures: Figures, currency: str | None = None
    ) -> None:
        self._model = model
        self._service = service
        self._totals = totals
        self._figures = figures
        self._currency = currency
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def describe(self) -> list[Metric]:
        """Nothing is collected at the start."""
        return []

    def collect(self) -> Iterator[Metric]:
        now = self._totals.update(self._service.statistics)
        yield from self._engine(now)
        yield from self._drafts(now)
        yield from self._requests()
        yield from self._money()
        yield from self._front()

    def _engine(self, now: Statistics) -> Iterator[Metric]:
        for name, text, read in _GAUGES:
            yield _gauge(name, text, {"model_name": self._model}, read(now))
        for name, text, read in _COUNTERS:
            family = CounterMetricFamily(name, text, labels=["model_name"])
            family.add_metric([self._model], read(now))
            for other, figures in self._routed().items() if name in _OF_REQUESTS else ():
                family.add_metric([other], _OF_REQUESTS[name](figures).sum)
            yield family
        restarts = CounterMetricFamily("abyssal:engine_restarts", "Times the engine's process was started again.")
        restarts.add_metric([], self._service.restarts)
        yield restarts
        states = GaugeMetricFamily("abyssal:engine_state", "1 for the state that the engine is in.", labels=["state"])
        for state in State:
            states.add_metric([state.value], float(self._service.state is state))
        yield states

    def _drafts(self, now: Statistics) -> Iterator[Metric]:
        counted = (
            ("vllm:spec_decode_num_accepted_tokens_per_pos", "Drafts accepted, by position.", now.accepted),
            ("abyssal:spec_decode_num_draft_tokens_per_pos", "Drafts verified, by position.", now.drafted),
        )
        for name, text, values in counted:
            family = CounterMetricFamily(name, text, labels=["model_name", "position"])
            for position, value in enumerate(values):
                family.add_metric([self._model, str(position)], value)
            yield family

    def _models(self) -> dict[str, ModelFigures]:
        """The engine's own model is there from the start, so that its first request is seen as an increase."""
        return {self._model: ModelFigures()} | self._figures.models

    def _routed(self) -> dict[str, ModelFigures]:
        return {name: model for name, model in self._figures.models.items() if name != self._model}

    def _requests(self) -> Iterator[Metric]:
        ended = CounterMetricFamily(
            "vllm:request_success", "Requests that ended, by how.", labels=["model_name", "finished_reason"]
        )
        cached = CounterMetricFamily(
            "abyssal:request_cached_tokens", "Prompt tokens from a cache.", labels=["model_name"]
        )
        reasoning = CounterMetricFamily("abyssal:request_reasoning_tokens", "Of the output.", labels=["model_name"])
        for name, model in self._models().items():
            for reason in dict.fromkeys(REASONS.values()):
                ended.add_metric([name, reason], model.finished[reason])
            cached.add_metric([name], model.cached_tokens)
            reasoning.add_metric([name], model.reasoning_tokens)
        yield from (ended, cached, reasoning)
        for name, text, read in _HISTOGRAMS:
            family = HistogramMetricFamily(name, text, labels=["model_name"])
            for model_name, model in self._models().items():
                family.add_metric([model_name], read(model).buckets(), read(model).sum)
            yield family

    def _money(self) -> Iterator[Metric]:
        if self._currency is None:
            return
        labels = ["model_name", "currency"]
        saved = CounterMetricFamily("abyssal:cache_saved_money", "What cache hits saved callers.", labels=labels)
        charged = CounterMetricFamily("abyssal:charged_money", "What requests cost callers.", labels=labels)
        for name, model in self._models().items():
            saved.add_metric([name, self._currency], model.saved / NANO)
            charged.add_metric([name, self._currency], model.charged / NANO)
        yield from (saved, charged)

    def _front(self) -> Iterator[Metric]:
        responses = CounterMetricFamily(
            "abyssal:http_responses", "Responses of the API, by route and status.", labels=["path", "status"]
        )
        for (path, status), count in self._figures.responses.items():
            responses.add_metric([path, str(status)], count)
        yield responses
        seconds = HistogramMetricFamily(
            "abyssal:http_response_seconds", "From a request's first byte to its answer's last.", labels=["path"]
        )
        for path, histogram in self._figures.response_seconds.items():
            seconds.add_metric([path], histogram.buckets(), histogram.sum)
        yield seconds


def _usage(now: Statistics) -> float:
    return now.used_pages / now.total_pages if now.total_pages else 0.0


def _gauge(name: str, text: str, labels: dict[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(name, text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family
