"""Prometheus metrics: vLLM's names where the meaning is the same, `penstock:` names for the rest.

Counts what passes through the server; reads everything else from the engine's statistics when it is scraped. Belongs to
one app, not to the process, so several apps do not collide.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from penstock import __version__
from penstock.api.protocols import Engine
from penstock.outputs import RequestOutput

_SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_LONG_SECONDS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


# Reasons of ends that the engine counts: no result comes through the server then.
_EARLY_ENDS = ("abort", "deadline", "error")


class Histogram:
    """Counts values by bucket; `observe` takes well under a microsecond, unlike the client library's."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Add a value, `count` times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def family(self, name: str, text: str, labels: Mapping[str, str]) -> HistogramMetricFamily:
        """The histogram as Prometheus exposes it."""
        buckets, total = [], 0
        for bound, count in zip((*map(float, self._bounds), float("inf")), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), total))
        family = HistogramMetricFamily(name, text, labels=list(labels))
        family.add_metric(list(labels.values()), buckets, self._sum)
        return family


class Metrics(Collector):
    """The metrics of one app."""

    def __init__(self, engine: Engine, model_name: Callable[[], str]) -> None:
        self._engine = engine
        self._model_name = model_name
        self.first_token = Histogram(_SECONDS)
        self.inter_token = Histogram(_SECONDS)
        self._end_to_end = Histogram(_LONG_SECONDS)
        self._queue_time = Histogram(_LONG_SECONDS)
        self._prefill_time = Histogram(_LONG_SECONDS)
        self._decode_time = Histogram(_LONG_SECONDS)
        self._inference_time = Histogram(_LONG_SECONDS)
        self._prompt_tokens = Histogram(_TOKENS)
        self._generation_tokens = Histogram(_TOKENS)
        self._finished: Counter[str] = Counter()
        self._responses: Counter[tuple[str, str]] = Counter()  # by path and status
        self._totals: Counter[str] = Counter()

    def record_output(self, output: RequestOutput) -> None:
        """Record a request that has ended."""
        times = output.metrics
        for histogram, seconds in (
            (self.first_token, times.first_token_s),
            (self._end_to_end, times.total_s),
            (self._queue_time, times.queued_s),
            (self._prefill_time, _between(times.queued_s, times.first_token_s)),
            (self._decode_time, _between(times.first_token_s, times.total_s)),
            (self._inference_time, _between(times.queued_s, times.total_s)),
        ):
            if seconds is not None:
                histogram.observe(seconds)
        self._prompt_tokens.observe(len(output.prompt_token_ids))
        self._totals["prompt"] += len(output.prompt_token_ids)
        for completion in output.outputs:
            self._generation_tokens.observe(len(completion.token_ids))
            self._totals["generated"] += len(completion.token_ids)
            self._finished[completion.finish_reason or "abort"] += 1

    def record_mean_gap(self, output: RequestOutput) -> None:
        """Record the mean time between the tokens of a request that was not streamed."""
        first_s, total_s = output.metrics.first_token_s, output.metrics.total_s
        num_gaps = max((len(completion.token_ids) for completion in output.outputs), default=0) - 1
        if first_s is not None and total_s is not None and num_gaps > 0:
            self.inter_token.observe((total_s - first_s) / num_gaps, num_gaps)

    def record_cut(self) -> None:
        """Note that a refused request is submitted again with fewer tokens: the engine counts its refusal."""
        self._totals["cut"] += 1

    def record_response(self, path: str, status: int) -> None:
        """Count an HTTP response by the path of its route."""
        self._responses[path, str(status)] += 1

    @property
    def _labels(self) -> Mapping[str, str]:
        return {"model_name": self._model_name()}

    def text(self) -> bytes:
        """What /metrics answers."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        """All metrics. Called by the registry, once per scrape."""
        stats = self._engine.get_stats()
        queue = _numbers(stats.get("queue"))
        yield from self._engine_metrics(stats)
        for histogram, name, text in (
            (self.first_token, "vllm:time_to_first_token_seconds", "Time to the first token."),
            (self.inter_token, "vllm:inter_token_latency_seconds", "Time between two tokens of a stream."),
            (self._end_to_end, "vllm:e2e_request_latency_seconds", "Time from arrival to the end."),
            (self._queue_time, "vllm:request_queue_time_seconds", "Time in the queue."),
            (self._prefill_time, "vllm:request_prefill_time_seconds", "Time from the queue to the first token."),
            (self._decode_time, "vllm:request_decode_time_seconds", "Time from the first token to the end."),
            (self._inference_time, "vllm:request_inference_time_seconds", "Time from the queue to the end."),
            (self._prompt_tokens, "vllm:request_prompt_tokens", "Prompt tokens of a request."),
            (self._generation_tokens, "vllm:request_generation_tokens", "New tokens of a completion."),
        ):
            yield histogram.family(name, text, self._labels)
        finished = CounterMetricFamily("vllm:request_success", "Completions.", labels=["model_name", "finished_reason"])
        early = {reason: queue.get(f"num_finished_{reason}", 0) for reason in _EARLY_ENDS}
        for reason, count in {"stop": 0, "length": 0, **self._finished, **early}.items():
            finished.add_metric([*self._labels.values(), reason], count)
        yield finished
        responses = CounterMetricFamily("penstock:http_responses", "HTTP responses.", labels=["path", "status"])
        for labels, count in self._responses.items():
            responses.add_metric(list(labels), count)
        yield responses
        info = GaugeMetricFamily("penstock:info", "The version.", labels=["version"])
        info.add_metric([__version__], 1)
        yield info

    def _engine_metrics(self, stats: Mapping[str, object]) -> Iterator[Metric]:
        """What the engine knows, also about requests that did not come over HTTP."""
        queue, cache, totals = (_numbers(stats.get(name)) for name in ("queue", "cache_info", "totals"))
        yield self._gauge("vllm:num_requests_running", "Running sequences.", queue.get("num_running", 0))
        yield self._gauge("vllm:num_requests_waiting", "Waiting sequences.", queue.get("num_waiting", 0))
        yield self._gauge("vllm:kv_cache_usage_perc", "Used share of the K/V cache, 0 to 1.", cache.get("usage", 0))
        yield self._gauge("penstock:open_requests", "Requests that have not ended.", queue.get("num_requests", 0))
        yield self._gauge(
            "penstock:memory_usage", "Used share of the memory, 0 to 1.", _number(stats.get("memory_usage"))
        )
        for name, text, value in (
            ("vllm:prompt_tokens", "Prompt tokens.", totals.get("prompt_tokens", self._totals["prompt"])),
            ("vllm:generation_tokens", "New tokens.", totals.get("generated_tokens", self._totals["generated"])),
            ("vllm:num_preemptions", "Preemptions.", queue.get("num_preemptions", 0)),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up.", cache.get("query_tokens", 0)),
            ("vllm:prefix_cache_hits", "Prompt tokens found.", cache.get("hit_tokens", 0)),
            ("vllm:spec_decode_num_draft_tokens", "Drafted tokens.", totals.get("drafted_tokens", 0)),
            ("vllm:spec_decode_num_accepted_tokens", "Accepted draft tokens.", totals.get("accepted_tokens", 0)),
            ("penstock:displaced_requests", "Displaced by a higher class.", totals.get("displaced_requests", 0)),
            ("penstock:steps", "Steps of the engine.", totals.get("steps", 0)),
        ):
            yield self._counter(name, text, value)
        refused = CounterMetricFamily("penstock:refused_requests", "Refusals.", labels=["model_name", "error"])
        for error, count in _numbers(stats.get("refusals")).items():
            num_cut = self._totals["cut"] if error == "RequestTooLarge" else 0
            refused.add_metric([*self._labels.values(), error], max(0, count - num_cut))
        yield refused
        yield from self._replica_metrics(stats)

    def _replica_metrics(self, stats: Mapping[str, object]) -> Iterator[Metric]:
        """What an engine of several replicas knows of each."""
        parts, labels = _sections(stats.get("replicas")), ["model_name", "replica"]
        routing = [_numbers(part) for part in _sections(stats.get("routing"))]
        is_up = [float(part.get("engine_status") != "failed") for part in parts]
        queues = [_numbers(part.get("queue")) for part in parts]
        for name, text, values in (
            ("running", "Running sequences of a replica.", [queue.get("num_running", 0) for queue in queues]),
            ("waiting", "Waiting sequences of a replica.", [queue.get("num_waiting", 0) for queue in queues]),
            ("kv_cache_usage", "Used share of a replica's K/V cache, 0 to 1.", _of_caches(parts, "usage")),
            ("prefix_cache_hits", "Prompt tokens that a replica found.", _of_caches(parts, "hit_tokens")),
            ("up", "1 for a replica that serves, 0 for one that failed.", is_up),
            ("routed_requests", "Requests that a replica was given.", [replica["num_requests"] for replica in routing]),
        ):
            family = GaugeMetricFamily(f"penstock:replica_{name}", text, labels=labels)
            for number, value in enumerate(values):
                family.add_metric([*self._labels.values(), str(number)], value)
            if values:
                yield family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family


def _between(begin_s: float | None, end_s: float | None) -> float | None:
    return None if begin_s is None or end_s is None else end_s - begin_s


def _numbers(section: object) -> Mapping[str, float]:
    return cast(Mapping[str, float], section) if isinstance(section, Mapping) else {}


def _sections(parts: object) -> Sequence[Mapping[str, object]]:
    return cast(Sequence[Mapping[str, object]], parts) if isinstance(parts, list) else []


def _of_caches(parts: Sequence[Mapping[str, object]], name: str) -> list[float]:
    return [_numbers(part.get("cache_info")).get(name, 0) for part in parts]


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
