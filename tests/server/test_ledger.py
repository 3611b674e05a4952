"""What waits to be counted is counted once, and is there when somebody looks."""

from __future__ import annotations

from engine.types import EngineStats
from server.metrics import Metrics
from tests.server.test_metrics import INFO


def test_steps_and_tokens_are_counted_once_whenever_they_are() -> None:
    """What waits in the ledger is on the page, and so is what did not fit into it."""
    metrics = Metrics()
    observer = metrics.observer("m", INFO)
    for step in range(1, 401):
        observer.on_step(EngineStats(steps=step, step_tokens=3, prefix_queries=step))
        observer.on_tokens(2, step == 1, 0.5)
    for _ in range(2):
        page = metrics.render()[0].decode()
        for line in (
            "vllm:generation_tokens_total{%s} 800.0",
            "vllm:iteration_tokens_total_count{%s} 400.0",
            "vllm:inter_token_latency_seconds_count{%s} 399.0",
            "vllm:time_to_first_token_seconds_count{%s} 1.0",
            "vllm:prefix_cache_queries_total{%s} 400.0",
        ):
            assert line % 'engine="0",model_name="m"' in page.splitlines()
