"""The metrics page against the names, labels and bucket edges that vLLM's dashboards and autoscalers query."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.config import KVConfig
from engine.types import EngineStats, FinishReason, ModelInfo, RequestSummary, Usage
from server.metrics import Metrics

INFO = ModelInfo("m", "demo", 8192, 49152, (2,), 16, 700, 1, "fp16", "autoregressive")
SUMMARY = RequestSummary(
    usage=Usage(prompt_tokens=100, completion_tokens=21, cached_tokens=64),
    finish=FinishReason.LENGTH,
    max_tokens=21,
    n=2,
    e2e=3.5,
    queue=0.25,
    prefill=1.0,
    decode=2.0,
    first_token=1.25,
    preemptions=1,
)
DRAFTED = replace(INFO, drafter="dflash", max_draft=3, verifier="strict")
DRAFTS = "vllm:spec_decode_num_drafts_total"
DRAFT_TOKENS = "vllm:spec_decode_num_draft_tokens_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
ACCEPTED_AT = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
ENGINE_LABELS = {"model_name": "m", "engine": "0"}
LATENCY = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"
FIRST_TOKEN = "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
INTERVAL = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80"
TOKENS = "1 2 5 10 20 50 100 200 500 1000 2000 5000"
BUCKETS = {
    "vllm:e2e_request_latency_seconds": LATENCY,
    "vllm:request_queue_time_seconds": LATENCY,
    "vllm:request_inference_time_seconds": LATENCY,
    "vllm:request_prefill_time_seconds": LATENCY,
    "vllm:request_decode_time_seconds": LATENCY,
    "vllm:time_to_first_token_seconds": FIRST_TOKEN,
    "vllm:inter_token_latency_seconds": INTERVAL,
    "vllm:request_time_per_output_token_seconds": INTERVAL,
    "vllm:iteration_tokens_total": "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384",
    "vllm:request_params_n": "1 2 5 10 20",
    "vllm:request_num_preemptions": "1 2 3 4 5 10 20",
    "vllm:request_prompt_tokens": TOKENS,
    "vllm:request_generation_tokens": TOKENS,
    "vllm:request_max_num_generation_tokens": TOKENS,
    "vllm:request_params_max_tokens": TOKENS,
    "vllm:request_prefill_kv_computed_tokens": TOKENS,
}
PLAIN = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:external_prefix_cache_queries_total",
    "vllm:external_prefix_cache_hits_total",
    "vllm:mm_cache_queries_total",
    "vllm:mm_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_cached_total",
    "vllm:gpu_cache_usage_perc",
    "vllm:gpu_prefix_cache_hit_rate",
    "vllm:gpu_prefix_cache_hits_total",
    "vllm:gpu_prefix_cache_queries_total",
]
LABELLED = {
    "vllm:num_requests_waiting_by_reason": ("reason", "capacity deferred"),
    "vllm:engine_sleep_state": ("sleep_state", "awake weights_offloaded discard_all"),
    "vllm:request_success_total": ("finished_reason", "stop length abort error repetition"),
    "vllm:prompt_tokens_by_source_total": ("source", "local_compute local_cache_hit external_kv_transfer"),
    "vllm:prompt_tokens_cached_by_source_total": ("source", "device host p2p disk external_unspecified"),
}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(metrics: Metrics) -> Samples:
    """Every exposed sample by name and labels, read the way a scraper reads them."""
    body, content_type = metrics.render()
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    families = text_string_to_metric_families(body.decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(page: Samples, name: str, **labels: str) -> float:
    return page[name, frozenset({**ENGINE_LABELS, **labels}.items())]


def rejections(page: Samples) -> dict[str, float]:
    found = {frozenset(key[1]): v for key, v in page.items() if key[0] == "vllm:admission_rejections_total"}
    return {dict(labels)["reason"]: v for labels, v in found.items() if set(dict(labels)) == {"model_name", "reason"}}


def test_every_series_is_there_at_zero_before_the_first_request() -> None:
    metrics = Metrics()
    metrics.observer("m", INFO)
    page = samples(metrics)
    assert {name: value(page, name) for name in PLAIN} == dict.fromkeys(PLAIN, 0.0)
    for name, (label, values) in LABELLED.items():
        shown = {v: value(page, name, **{label: v}) for v in values.split()}
        assert shown == {v: float(v == "awake") for v in values.split()}
    assert {name: value(page, f"{name}_count") for name in BUCKETS} == dict.fromkeys(BUCKETS, 0.0)
    assert rejections(page) == {"max_num_queued_reqs": 0.0, "max_num_queued_tokens": 0.0}
    assert {"process_resident_memory_bytes", "process_open_fds", "python_info", "python_gc_collections_total"} <= {
        name for name, _ in page
    }


@pytest.mark.parametrize("name", BUCKETS)
def test_histograms_keep_every_known_edge_and_add_only_outside(name: str) -> None:
    metrics = Metrics()
    metrics.observer("m", INFO)
    labels = [dict(key[1]) for key in samples(metrics) if key[0] == f"{name}_bucket"]
    edges = sorted(float(label["le"]) for label in labels)
    known = [float(edge) for edge in BUCKETS[name].split()]
    assert [edge for edge in edges if known[0] <= edge <= known[-1]] == known
    assert edges[-1] == float("inf")


def test_the_cache_configuration_is_told_in_labels() -> None:
    metrics = Metrics(KVConfig(utilization=0.75, prefix_cache=False))
    metrics.observer("m", INFO)
    told = {"block_size": "16", "num_gpu_blocks": "700", "gpu_memory_utilization": "0.75", "cache_dtype": "auto"}
    assert value(samples(metrics), "vllm:cache_config_info", **told, enable_prefix_caching="False") == 1


def test_a_step_sets_gauges_and_moves_counters_by_what_is_new() -> None:
    metrics = Metrics()
    observer = metrics.observer("m", INFO)
    stats = EngineStats(
        steps=10,
        running=3,
        waiting=4,
        kv_blocks_used=70,
        kv_blocks_total=700,
        kv_blocks_cached=9,
        preemptions=2,
        prefix_queries=400,
        prefix_hits=100,
        step_tokens=48,
        step_seconds=0.04,
    )
    observer.on_step(stats)
    observer.on_step(replace(stats, steps=11, preemptions=3, prefix_queries=500, prefix_hits=200, running=1))
    page = samples(metrics)
    assert value(page, "vllm:num_requests_running") == 1
    assert value(page, "vllm:num_requests_waiting") == 4
    assert value(page, "vllm:num_requests_waiting_by_reason", reason="capacity") == 4
    assert value(page, "vllm:kv_cache_usage_perc") == value(page, "vllm:gpu_cache_usage_perc") == 0.1
    assert value(page, "slipstream:kv_blocks_cached") == 9
    assert value(page, "vllm:num_preemptions_total") == 3
    for prefix in ("vllm:", "vllm:gpu_"):
        assert value(page, f"{prefix}prefix_cache_queries_total") == 500
        assert value(page, f"{prefix}prefix_cache_hits_total") == 200
    assert value(page, "vllm:gpu_prefix_cache_hit_rate") == 0.4
    assert value(page, "vllm:iteration_tokens_total_count") == 2
    assert value(page, "vllm:iteration_tokens_total_sum") == 96
    assert value(page, "slipstream:engine_step_seconds_sum") == pytest.approx(0.08)


def test_counters_never_fall_when_the_engine_process_starts_again() -> None:
    metrics = Metrics()
    observer = metrics.observer("m", INFO)
    observer.on_step(EngineStats(steps=100, preemptions=5, prefix_queries=900, prefix_hits=300))
    observer.on_step(EngineStats(steps=1, preemptions=1, prefix_queries=50))
    page = samples(metrics)
    assert value(page, "vllm:num_preemptions_total") == 6
    assert value(page, "vllm:prefix_cache_queries_total") == 950
    assert value(page, "vllm:prefix_cache_hits_total") == 300


def speculation(page: Samples, model: str = "m") -> dict[str, float | list[float]]:
    """What is exposed under vLLM's names of speculation for a model; by position in the order of their positions."""
    found = {key: v for key, v in page.items() if "vllm:spec_decode" in key[0] and not key[0].endswith("_created")}
    of_model = {key: v for key, v in found.items() if dict(key[1])["model_name"] == model}
    at = {dict(labels)["position"]: v for (name, labels), v in of_model.items() if name == ACCEPTED_AT}
    assert list(map(str, range(len(at)))) == sorted(at)
    assert all(set(dict(labels)) - {"position"} == {"model_name", "engine"} for _, labels in of_model)
    plain = {name: v for (name, _), v in of_model.items() if name != ACCEPTED_AT}
    return {**plain, ACCEPTED_AT: [at[position] for position in sorted(at)]} if at else dict(plain)


def test_speculation_is_exposed_from_the_start_and_only_with_a_drafter() -> None:
    metrics = Metrics()
    metrics.observer("m", DRAFTED)
    plain = metrics.observer("plain", INFO)
    plain.on_step(EngineStats(steps=1, spec_rounds=3, spec_drafted=9, spec_accepted=1, spec_accepted_at=(1, 0, 0)))
    page = samples(metrics)
    assert speculation(page) == {DRAFTS: 0, DRAFT_TOKENS: 0, ACCEPTED: 0, ACCEPTED_AT: [0, 0, 0]}
    assert speculation(page, "plain") == {}
    text = metrics.render()[0].decode()
    for name in (DRAFTS, DRAFT_TOKENS, ACCEPTED, ACCEPTED_AT):
        assert f"# TYPE {name} counter\n" in text


def test_speculation_counts_what_is_new_and_survives_a_restart() -> None:
    metrics = Metrics()
    observer = metrics.observer("m", DRAFTED)
    first = EngineStats(steps=50, spec_rounds=10, spec_drafted=30, spec_accepted=12, spec_accepted_at=(7, 4, 1))
    second = EngineStats(steps=51, spec_rounds=12, spec_drafted=35, spec_accepted=14, spec_accepted_at=(8, 5, 1))
    for stats in (EngineStats(steps=1), first, first, second):
        observer.on_step(stats)
    assert speculation(samples(metrics)) == {DRAFTS: 12, DRAFT_TOKENS: 35, ACCEPTED: 14, ACCEPTED_AT: [8, 5, 1]}
    observer.on_step(EngineStats(steps=2, spec_rounds=1, spec_drafted=3, spec_accepted=3, spec_accepted_at=(1, 1, 1)))
    assert speculation(samples(metrics)) == {DRAFTS: 13, DRAFT_TOKENS: 38, ACCEPTED: 17, ACCEPTED_AT: [9, 6, 2]}


def test_speculation_survives_a_restart_that_no_report_told_of() -> None:
    """The new process is past the old one's steps when it is heard of: some news is lost, and nothing raises."""
    metrics = Metrics()
    observer = metrics.observer("m", DRAFTED)
    observer.on_step(EngineStats(steps=5, spec_rounds=2, spec_drafted=6, spec_accepted=6, spec_accepted_at=(2, 2, 2)))
    observer.on_step(EngineStats(steps=9, spec_rounds=4, spec_drafted=4, spec_accepted=0, spec_accepted_at=(0, 0, 0)))
    assert speculation(samples(metrics)) == {DRAFTS: 4, DRAFT_TOKENS: 6, ACCEPTED: 6, ACCEPTED_AT: [2, 2, 2]}


def test_a_report_without_a_step_counts_no_step() -> None:
    metrics = Metrics()
    observer = metrics.observer("m", INFO)
    for _ in range(3):
        observer.on_step(EngineStats(steps=1, step_tokens=8))
    assert value(samples(metrics), "vllm:iteration_tokens_total_count") == 1


def test_tokens_feed_the_latency_histograms() -> None:
    metrics = Metrics()
    observer = metrics.observer("m", INFO)
    observer.on_tokens(1, True, 0.5)
    observer.on_tokens(4, False, 0.002)
    observer.on_tokens(1, False, 0.03)
    page = samples(metrics)
    assert value(page, "vllm:generation_tokens_total") == 6
    assert value(page, "vllm:time_to_first_token_seconds_sum") == 0.5
    assert value(page, "vllm:inter_token_latency_seconds_count") == 2
    assert value(page, "vllm:inter_token_latency_seconds_bucket", le="0.002") == 1
    assert value(page, "vllm:inter_token_latency_seconds_bucket", le="0.05") == 2


def test_a_finished_request_feeds_every_histogram_of_requests() -> None:
    metrics = Metrics()
    metrics.observer("m", INFO).on_finish(SUMMARY)
    page = samples(metrics)
    sums = {
        "vllm:request_prompt_tokens": 100,
        "vllm:request_generation_tokens": 21,
        "vllm:request_max_num_generation_tokens": 21,
        "vllm:request_params_max_tokens": 21,
        "vllm:request_prefill_kv_computed_tokens": 36,
        "vllm:request_params_n": 2,
        "vllm:request_num_preemptions": 1,
        "vllm:e2e_request_latency_seconds": 3.5,
        "vllm:request_queue_time_seconds": 0.25,
        "vllm:request_inference_time_seconds": 3.0,
        "vllm:request_prefill_time_seconds": 1.0,
        "vllm:request_decode_time_seconds": 2.0,
        "vllm:request_time_per_output_token_seconds": 0.1,
    }
    assert {name: value(page, f"{name}_sum") for name in sums} == sums
    assert {name: value(page, f"{name}_count") for name in sums} == dict.fromkeys(sums, 1.0)
    assert value(page, "vllm:request_success_total", finished_reason="length") == 1
    assert value(page, "vllm:prompt_tokens_total") == 100
    assert value(page, "vllm:prompt_tokens_cached_total") == 64
    assert value(page, "vllm:prompt_tokens_by_source_total", source="local_compute") == 36
    assert value(page, "vllm:prompt_tokens_by_source_total", source="local_cache_hit") == 64
    assert value(page, "vllm:prompt_tokens_cached_by_source_total", source="device") == 64


def test_a_request_that_never_ran_counts_no_prompt() -> None:
    metrics = Metrics()
    usage = Usage(prompt_tokens=100, completion_tokens=0)
    gone = replace(SUMMARY, usage=usage, finish=FinishReason.ABORT, prefill=0.0, decode=0.0, first_token=None)
    metrics.observer("m", INFO).on_finish(gone)
    page = samples(metrics)
    assert value(page, "vllm:request_success_total", finished_reason="abort") == 1
    assert value(page, "vllm:prompt_tokens_total") == 0
    assert value(page, "vllm:request_time_per_output_token_seconds_count") == 0


@pytest.mark.parametrize("finish", FinishReason)
def test_every_way_to_finish_is_counted(finish: FinishReason) -> None:
    metrics = Metrics()
    metrics.observer("m", INFO).on_finish(replace(SUMMARY, finish=finish))
    assert value(samples(metrics), "vllm:request_success_total", finished_reason=finish.value) == 1


def test_rejections_have_the_two_known_reasons_only() -> None:
    metrics = Metrics()
    observer = metrics.observer("m", INFO)
    for reason in ("max_num_queued_reqs", "max_num_queued_reqs", "max_num_queued_tokens", "draining"):
        observer.on_rejected(reason)
    assert rejections(samples(metrics)) == {"max_num_queued_reqs": 2.0, "max_num_queued_tokens": 1.0}


def test_models_do_not_mix_and_servers_share_nothing() -> None:
    metrics, other = Metrics(), Metrics()
    metrics.observer("m", INFO)
    second = metrics.observer('we"ird\n', INFO)
    second.on_tokens(5, True, 0.1)
    page = samples(metrics)
    assert value(page, "vllm:generation_tokens_total") == 0
    assert value(page, "vllm:generation_tokens_total", model_name='we"ird\n') == 5
    assert not any(name.startswith("vllm:") for name, labels in samples(other) if labels)


def test_http_exchanges_have_the_instrumentators_names() -> None:
    metrics = Metrics()
    metrics.observe_http("/v1/completions", "POST", 200, 0.3, request_bytes=10, response_bytes=1000)
    metrics.observe_http("/v1/completions", "POST", 404, 2.0, request_bytes=30, response_bytes=100)
    metrics.observe_http("/metrics", "GET", 200, 0.1, request_bytes=0, response_bytes=1)
    page = samples(metrics)
    handler = ("handler", "/v1/completions")
    post = frozenset({handler, ("method", "POST")})
    assert page["http_requests_total", post | {("status", "2xx")}] == 1
    assert page["http_requests_total", post | {("status", "4xx")}] == 1
    assert page["http_request_size_bytes_sum", frozenset({handler})] == 40
    assert page["http_response_size_bytes_sum", frozenset({handler})] == 1100
    assert page["http_request_duration_seconds_bucket", post | {("le", "0.5")}] == 1
    assert page["http_request_duration_highr_seconds_count", frozenset()] == 2
    assert not any(("handler", "/metrics") in labels for _, labels in page)


def test_a_client_cannot_grow_the_page_by_inventing_methods() -> None:
    metrics = Metrics()
    for method in ("BREW", "brew", "X" * 1000):
        metrics.observe_http("none", method, 405, 0.1, 0, 0)
    labels = frozenset({("handler", "none"), ("method", "OTHER"), ("status", "4xx")})
    assert samples(metrics)["http_requests_total", labels] == 3
