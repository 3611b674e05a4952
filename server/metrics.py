"""What `/metrics` shows. One `Metrics` per server, with a registry of its own; one observer per served model.

Every label value comes from a closed set (models served, routes, HTTP methods, reasons), so no client can grow the
page. Label children are looked up once per model: an observer's call costs a few attribute reads and additions.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    Summary,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from engine.config import KVConfig
from engine.protocols import EngineObserver
from engine.types import EngineStats, ModelInfo, RequestSummary, VerifierStats
from server import metric_names as names
from server.ledger import Ledger
from server.limits import LIMITS

_UNCOUNTED_HANDLERS = frozenset(
    {"/metrics", "/health", "/ready", "/load", "/ping", "/version", "/server_info", "/is_sleeping"}
)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Metrics:
    """The registry and everything in it. Use it from one thread."""

    def __init__(self, kv: KVConfig | None = None) -> None:
        self._kv = kv or KVConfig()
        self.registry = CollectorRegistry()
        self._families = _Families(self.registry)
        self._http = _HttpMetrics(self.registry)
        self._ledgers: list[Ledger] = []
        self._limited = Counter(*names.RATE_LIMITED, ("key", "limit"), registry=self.registry)
        self._key_running = Gauge(*names.KEY_RUNNING, ("key",), registry=self.registry)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def observer(self, model_name: str, info: ModelInfo, engine: int = 0) -> EngineObserver:
        """The observer of one served model; from now on its series are exposed, starting at 0."""
        self._families.cache_config.labels(
            model_name=model_name,
            engine=str(engine),
            block_size=str(info.block_size),
            num_gpu_blocks=str(info.num_blocks),
            gpu_memory_utilization=f"{self._kv.utilization:g}",
            enable_prefix_caching=str(self._kv.prefix_cache),
            cache_dtype=self._kv.dtype,
        ).set(1)
        ledger = Ledger(_ModelObserver(self._families, model_name, str(engine), info))
        self._ledgers.append(ledger)
        return ledger

    def watch(self, model_name: str, healthy: Callable[[], bool], engine: int = 0) -> None:
        """Expose what `healthy` says at the time of each scrape."""
        self._families.health.labels(model_name, str(engine)).set_function(lambda: float(healthy()))

    def observe_http(
        self, handler: str, method: str, status: int, seconds: float, request_bytes: int, response_bytes: int
    ) -> None:
        """Count one finished HTTP exchange. `handler` is the route's template, or "none" where no route matched."""
        if handler not in _UNCOUNTED_HANDLERS:
            self._http.observe(handler, method, status, seconds, request_bytes, response_bytes)

    def watch_key(self, key: str, running: Callable[[], int]) -> None:
        """Expose an API key's series, from 0 on. `key` is its name, never the key."""
        self._key_running.labels(key).set_function(running)
        for limit in LIMITS:
            self._limited.labels(key, limit)

    def limited(self, key: str, limit: str) -> None:
        """Count a request that was refused with 429."""
        self._limited.labels(key, limit).inc()

    def render(self) -> tuple[bytes, str]:
        """The page and its content type, in Prometheus' text format 0.0.4 (which every scraper reads)."""
        for ledger in self._ledgers:
            ledger.settle()
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4


class _Families:
    """The engine's metric families, without label values yet."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = names.MODEL_LABELS
        self.gauges = {name: Gauge(name, text, labels, registry=registry) for name, text in names.GAUGES.items()}
        self.health = Gauge(*names.HEALTH, labels, registry=registry)
        self.counters = {name: Counter(name, text, labels, registry=registry) for name, text in names.COUNTERS.items()}
        self.histograms = {
            name: Histogram(name, text, labels, buckets=buckets, registry=registry)
            for name, (text, buckets) in names.HISTOGRAMS.items()
        }
        self.labelled_gauges = {
            name: Gauge(name, text, (*labels, label), registry=registry)
            for name, (text, label, _) in names.LABELLED_GAUGES.items()
        }
        self.labelled_counters = {
            name: Counter(name, text, (*labels, label), registry=registry)
            for name, (text, label, _) in names.LABELLED_COUNTERS.items()
        }
        self.speculation = {
            name: Counter(name, text, labels, registry=registry) for name, text in names.SPECULATION_COUNTERS.items()
        }
        self.verifiers = {
            field: Counter(name, text, (*labels, "verifier"), registry=registry)
            for field, (name, text) in names.VERIFIER_COUNTERS.items()
        }
        self.diffusion = {
            field: Counter(name, text, labels, registry=registry)
            for field, (name, text) in names.DIFFUSION_COUNTERS.items()
        }
        self.accepted_at = Counter(*names.ACCEPTED_BY_POSITION, (*labels, "position"), registry=registry)
        self.rejections = Counter(
            "vllm:admission_rejections_total",
            "Requests refused because of load.",
            ("model_name", "reason"),
            registry=registry,
        )
        self.cache_config = Gauge(
            "vllm:cache_config_info",
            "How the KV cache is set up; always 1.",
            (
                *labels,
                *("block_size", "num_gpu_blocks", "gpu_memory_utilization", "enable_prefix_caching", "cache_dtype"),
            ),
            registry=registry,
        )


class _ModelObserver:
    """An `EngineObserver` that writes to one model's series."""

    def __init__(self, families: _Families, model: str, engine: str, info: ModelInfo) -> None:
        self._gauges = {name: family.labels(model, engine) for name, family in families.gauges.items()}
        self._counters = {name: family.labels(model, engine) for name, family in families.counters.items()}
        self._histograms = {name: family.labels(model, engine) for name, family in families.histograms.items()}
        gauges, counters = families.labelled_gauges, families.labelled_counters
        self._labelled_gauges = {
            (name, value): gauges[name].labels(model, engine, value)
            for name, (_, _, values) in names.LABELLED_GAUGES.items()
            for value in values
        }
        self._labelled_counters = {
            (name, value): counters[name].labels(model, engine, value)
            for name, (_, _, values) in names.LABELLED_COUNTERS.items()
            for value in values
        }
        self._rejections = {reason: families.rejections.labels(model, reason) for reason in names.REJECTION_REASONS}
        self._generated = self._counters["vllm:generation_tokens_total"]
        self._first_token = self._histograms["vllm:time_to_first_token_seconds"]
        self._between_tokens = self._histograms["vllm:inter_token_latency_seconds"]
        self._speculation = _SpeculationCounters(families, model, engine, info) if info.max_draft else None
        denoised = families.diffusion.items() if info.diffusion is not None else ()
        self._diffusion = [(attrgetter(field), family.labels(model, engine)) for field, family in denoised]
        self._last = EngineStats()
        self._labelled_gauges["vllm:engine_sleep_state", "awake"].set(1)

    def on_step(self, stats: EngineStats) -> None:
        gauges = self._gauges
        gauges["vllm:num_requests_running"].set(stats.running)
        gauges["vllm:num_requests_waiting"].set(stats.waiting)
        self._labelled_gauges["vllm:num_requests_waiting_by_reason", "capacity"].set(stats.waiting)
        usage = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        gauges["vllm:kv_cache_usage_perc"].set(usage)
        gauges["vllm:gpu_cache_usage_perc"].set(usage)
        gauges["slipstream:kv_blocks_cached"].set(stats.kv_blocks_cached)
        if stats.prefix_queries:
            gauges["vllm:gpu_prefix_cache_hit_rate"].set(stats.prefix_hits / stats.prefix_queries)
        # An engine process that was started again counts from 0: then the total is what is new.
        last = self._last if stats.steps >= self._last.steps else EngineStats()
        self._advance("vllm:num_preemptions_total", stats.preemptions - last.preemptions)
        for prefix in ("vllm:", "vllm:gpu_"):
            self._advance(f"{prefix}prefix_cache_queries_total", stats.prefix_queries - last.prefix_queries)
            self._advance(f"{prefix}prefix_cache_hits_total", stats.prefix_hits - last.prefix_hits)
        if self._speculation is not None and stats.spec_rounds > last.spec_rounds:
            self._speculation.advance(stats, last)
        for read, counter in self._diffusion:
            counter.inc(max(0, read(stats) - read(last)))
        if stats.steps > last.steps:
            self._histograms["vllm:iteration_tokens_total"].observe(stats.step_tokens)
            self._histograms["slipstream:engine_step_seconds"].observe(stats.step_seconds)
        self._last = stats

    def on_tokens(self, count: int, first: bool, interval: float) -> None:
        self._generated.inc(count)
        (self._first_token if first else self._between_tokens).observe(interval)

    def on_finish(self, summary: RequestSummary) -> None:
        usage = summary.usage
        self._labelled_counters["vllm:request_success_total", summary.finish.value].inc()
        if summary.first_token is not None or summary.prefill > 0:
            self._count_prompt(usage.prompt_tokens, usage.cached_tokens)
        observed = {
            "vllm:request_prompt_tokens": usage.prompt_tokens,
            "vllm:request_generation_tokens": usage.completion_tokens,
            "vllm:request_max_num_generation_tokens": usage.completion_tokens,
            "vllm:request_params_max_tokens": summary.max_tokens,
            "vllm:request_params_n": summary.n,
            "vllm:request_num_preemptions": summary.preemptions,
            "vllm:e2e_request_latency_seconds": summary.e2e,
            "vllm:request_queue_time_seconds": summary.queue,
            "vllm:request_inference_time_seconds": summary.prefill + summary.decode,
            "vllm:request_prefill_time_seconds": summary.prefill,
            "vllm:request_decode_time_seconds": summary.decode,
        }
        if usage.completion_tokens > 1:
            per_token = summary.decode / (usage.completion_tokens - 1)
            observed["vllm:request_time_per_output_token_seconds"] = per_token
        for name, value in observed.items():
            self._histograms[name].observe(value)

    def on_rejected(self, reason: str) -> None:
        if reason in self._rejections:  # draining is no load that an operator could relieve
            self._rejections[reason].inc()

    def _count_prompt(self, tokens: int, cached: int) -> None:
        """Count a prompt whose KV is complete."""
        self._advance("vllm:prompt_tokens_total", tokens)
        self._advance("vllm:prompt_tokens_cached_total", cached)
        self._labelled_counters["vllm:prompt_tokens_by_source_total", "local_compute"].inc(tokens - cached)
        self._labelled_counters["vllm:prompt_tokens_by_source_total", "local_cache_hit"].inc(cached)
        self._labelled_counters["vllm:prompt_tokens_cached_by_source_total", "device"].inc(cached)
        self._histograms["vllm:request_prefill_kv_computed_tokens"].observe(tokens - cached)

    def _advance(self, counter: str, count: int) -> None:
        if count > 0:
            self._counters[counter].inc(count)


class _SpeculationCounters:
    """What came of drafting for one model; at most `max_draft` tokens are drafted in one round."""

    def __init__(self, families: _Families, model: str, engine: str, info: ModelInfo) -> None:
        drafts, drafted, accepted = (families.speculation[name] for name in names.SPECULATION_COUNTERS)
        self._drafts = drafts.labels(model, engine)
        self._drafted = drafted.labels(model, engine)
        self._accepted = accepted.labels(model, engine)
        self._accepted_at = [families.accepted_at.labels(model, engine, str(i)) for i in range(info.max_draft)]
        self._of_verifiers = {
            card.name: {
                field: counter.labels(model, engine, card.name) for field, counter in families.verifiers.items()
            }
            for card in info.verifiers
        }

    def advance(self, stats: EngineStats, last: EngineStats) -> None:
        """Count what is in `stats` and was not in `last`."""
        self._drafts.inc(stats.spec_rounds - last.spec_rounds)
        self._drafted.inc(max(0, stats.spec_drafted - last.spec_drafted))
        self._accepted.inc(max(0, stats.spec_accepted - last.spec_accepted))
        before = last.spec_accepted_at or (0,) * len(stats.spec_accepted_at)
        for counter, now, then in zip(self._accepted_at, stats.spec_accepted_at, before, strict=False):
            counter.inc(max(0, now - then))
        known = {own.name: own for own in last.verifiers}
        for own in stats.verifiers:
            past = known.get(own.name, VerifierStats(own.name))
            for field, counter in self._of_verifiers.get(own.name, {}).items():
                counter.inc(max(0, getattr(own, field) - getattr(past, field)))


class _HttpMetrics:
    """The families of prometheus-fastapi-instrumentator, which vLLM's dashboards expect beside the engine's."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "http_requests_total",
            "Requests by method, status class and handler.",
            ("method", "status", "handler"),
            registry=registry,
        )
        self._request_bytes = Summary(
            "http_request_size_bytes", "Request body sizes by handler.", ("handler",), registry=registry
        )
        self._response_bytes = Summary(
            "http_response_size_bytes", "Response body sizes by handler.", ("handler",), registry=registry
        )
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "Request durations, few buckets, by method and handler.",
            ("method", "handler"),
            buckets=names.HTTP_BUCKETS,
            registry=registry,
        )
        self._fine_seconds = Histogram(
            "http_request_duration_highr_seconds",
            "Request durations, many buckets, no labels.",
            buckets=names.HTTP_FINE_BUCKETS,
            registry=registry,
        )

    def observe(
        self, handler: str, method: str, status: int, seconds: float, request_bytes: int, response_bytes: int
    ) -> None:
        method = method if method in _METHODS else "OTHER"
        self._requests.labels(method, f"{status // 100}xx", handler).inc()
        self._request_bytes.labels(handler).observe(request_bytes)
        self._response_bytes.labels(handler).observe(response_bytes)
        self._seconds.labels(method, handler).observe(seconds)
        self._fine_seconds.observe(seconds)
