"""The Prometheus series: vLLM's names, labels and bucket edges, so that existing dashboards work unchanged.

Bucket edges that vLLM does not have are added only below its first or above its last one: `histogram_quantile` over the
known edges gives the same answer. `slipstream:` names are used only for what has no name in vLLM.
"""

from __future__ import annotations

from typing import Final

MODEL_LABELS: Final = ("model_name", "engine")

LATENCY_BUCKETS: Final = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.2),  # ours: short answers of small models
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680),
)
FIRST_TOKEN_BUCKETS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
TOKEN_INTERVAL_BUCKETS: Final = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075),  # ours: several tokens a step arrive closer than 10 ms
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
STEP_TOKEN_BUCKETS: Final = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
# vLLM stops this series at the model's context length; one fixed series serves models of any length.
TOKEN_COUNT_BUCKETS: Final = (*(digit * 10**power for power in range(6) for digit in (1, 2, 5)), 1_000_000)
HTTP_BUCKETS: Final = (0.1, 0.5, 1)
HTTP_FINE_BUCKETS: Final = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60),
)

GAUGES: Final = {
    "vllm:num_requests_running": "Requests in the running batch.",
    "vllm:num_requests_waiting": "Requests waiting to be scheduled.",
    "vllm:kv_cache_usage_perc": "Share of the KV blocks that live requests hold; 1 is all.",
    "vllm:gpu_cache_usage_perc": "The older name of vllm:kv_cache_usage_perc.",
    "vllm:gpu_prefix_cache_hit_rate": "Prefix cache hits over queries since start; an older name.",
    "slipstream:kv_blocks_cached": "Free KV blocks that still hold a reusable prefix.",
}

# Read from the engine whenever the page is made. Exposed once the engine has started.
HEALTH: Final = (
    "slipstream:engine_healthy",
    "1 while the engine is alive and makes progress, else 0.",
)

COUNTERS: Final = {
    "vllm:prefix_cache_queries_total": "Prompt tokens looked up in the prefix cache.",
    "vllm:prefix_cache_hits_total": "Prompt tokens found in the prefix cache.",
    "vllm:gpu_prefix_cache_queries_total": "The older name of vllm:prefix_cache_queries_total.",
    "vllm:gpu_prefix_cache_hits_total": "The older name of vllm:prefix_cache_hits_total.",
    "vllm:external_prefix_cache_queries_total": "Tokens looked up in an external cache; there is none here.",
    "vllm:external_prefix_cache_hits_total": "Tokens found in an external cache; there is none here.",
    "vllm:mm_cache_queries_total": "Items looked up in a multimodal cache; there is none here.",
    "vllm:mm_cache_hits_total": "Items found in a multimodal cache; there is none here.",
    "vllm:num_preemptions_total": "Times a running request gave up its KV blocks to be computed again.",
    "vllm:prompt_tokens_total": "Prompt tokens of requests that were prefilled.",
    "vllm:generation_tokens_total": "Tokens generated.",
    "vllm:prompt_tokens_cached_total": "Prompt tokens that came from a cache.",
}

# Exposed for models that are served with a drafter, as in vLLM; the engine's totals, not those of answers.
SPECULATION_COUNTERS: Final = {
    "vllm:spec_decode_num_drafts_total": "Drafts that were verified: one per request and step with a draft.",
    "vllm:spec_decode_num_draft_tokens_total": "Drafted tokens that were verified.",
    "vllm:spec_decode_num_accepted_tokens_total": "Drafted tokens that stood.",
}
# One more label: `position`, from 0 up to the most that is drafted.
ACCEPTED_BY_POSITION: Final = (
    "vllm:spec_decode_num_accepted_tokens_per_pos_total",
    "Drafted tokens that stood, by their position in the draft.",
)

# One more label, `verifier`: each that requests may choose. The field of VerifierStats that a counter follows, its name
# and what it counts.
VERIFIER_COUNTERS: Final = {
    "rounds": ("slipstream:spec_decode_rounds_total", "Drafts that were verified, by verifier."),
    "drafted": ("slipstream:spec_decode_drafted_tokens_total", "Drafted tokens that were verified, by verifier."),
    "accepted": ("slipstream:spec_decode_accepted_tokens_total", "Drafted tokens that stood, by verifier."),
    "tokens": (
        "slipstream:spec_decode_tokens_total",
        "Tokens that verified drafts brought, the target's own included, by verifier.",
    ),
    "bias": (
        "slipstream:spec_decode_bias_total",
        "Estimated distance of these tokens' laws from the target's, in total variation and summed up, by verifier.",
    ),
}

# Exposed for models that denoise: the field of EngineStats, or of its `denoised`, that a counter follows; its name, and
# what it counts. The first three are vLLM's. The engine's totals, not those of answers.
DIFFUSION_COUNTERS: Final = {
    "denoise_steps": (
        "vllm:diffusion_num_denoising_steps_total",
        "Denoise steps: one per request and step that denoises.",
    ),
    "denoised.positions": (
        "vllm:diffusion_num_canvas_positions_total",
        "Positions fed to forward passes of requests that are denoised.",
    ),
    "denoise_committed": ("vllm:diffusion_num_committed_tokens_total", "Tokens that denoising brought."),
    "denoised.forwards": ("slipstream:diffusion_forwards_total", "Forward passes of the served model, by request."),
    "denoised.draft_forwards": (
        "slipstream:diffusion_draft_forwards_total",
        "Forward passes of a drafter that is a model of its own, by request.",
    ),
    "denoised.verifies": ("slipstream:diffusion_verifies_total", "Forward passes that verified drafted tokens."),
    "denoised.remasked": ("slipstream:diffusion_remasked_tokens_total", "Drafted tokens that verifying took back."),
}

# One more label, with every value it can have: all of them are exposed from the start.
LABELLED_GAUGES: Final = {
    "vllm:num_requests_waiting_by_reason": ("Waiting requests by reason.", "reason", ("capacity", "deferred")),
    "vllm:engine_sleep_state": (
        "1 for the state the engine is in; always awake here.",
        "sleep_state",
        ("awake", "weights_offloaded", "discard_all"),
    ),
}
LABELLED_COUNTERS: Final = {
    "vllm:request_success_total": (
        "Finished requests by reason.",
        "finished_reason",
        ("stop", "length", "abort", "error", "repetition"),
    ),
    "vllm:prompt_tokens_by_source_total": (
        "Prompt tokens by where their KV came from.",
        "source",
        ("local_compute", "local_cache_hit", "external_kv_transfer"),
    ),
    "vllm:prompt_tokens_cached_by_source_total": (
        "Prompt tokens from a cache, by the cache.",
        "source",
        ("device", "host", "p2p", "disk", "external_unspecified"),
    ),
}
# Labels `key`, the name of an API key as the settings have it, and `limit`: requests, tokens or concurrency.
RATE_LIMITED: Final = (
    "slipstream:rate_limited_requests_total",
    "Requests refused with 429 because of their key's limits.",
)
KEY_RUNNING: Final = ("slipstream:key_requests_running", "Requests of an API key that are being answered.")
REJECTION_REASONS: Final = ("max_num_queued_reqs", "max_num_queued_tokens")

HISTOGRAMS: Final[dict[str, tuple[str, tuple[float, ...]]]] = {
    "vllm:iteration_tokens_total": ("Tokens fed in one engine step.", STEP_TOKEN_BUCKETS),
    "vllm:request_prompt_tokens": ("Prompt tokens of a request.", TOKEN_COUNT_BUCKETS),
    "vllm:request_generation_tokens": ("Tokens generated for a request.", TOKEN_COUNT_BUCKETS),
    "vllm:request_max_num_generation_tokens": ("Most tokens of one choice of a request.", TOKEN_COUNT_BUCKETS),
    "vllm:request_params_max_tokens": ("The max_tokens parameter.", TOKEN_COUNT_BUCKETS),
    "vllm:request_prefill_kv_computed_tokens": ("Prompt tokens computed, not cached.", TOKEN_COUNT_BUCKETS),
    "vllm:request_params_n": ("The n parameter.", (1, 2, 5, 10, 20)),
    "vllm:request_num_preemptions": ("Times a request was preempted.", (1, 2, 3, 4, 5, 10, 20)),
    "vllm:time_to_first_token_seconds": ("Arrival to first token.", FIRST_TOKEN_BUCKETS),
    "vllm:inter_token_latency_seconds": (
        "Between two steps that brought tokens to a request, however many.",
        TOKEN_INTERVAL_BUCKETS,
    ),
    "vllm:request_time_per_output_token_seconds": (
        "Decode time of a request over its tokens after the first.",
        TOKEN_INTERVAL_BUCKETS,
    ),
    "vllm:e2e_request_latency_seconds": ("Arrival to last token.", LATENCY_BUCKETS),
    "vllm:request_queue_time_seconds": ("Arrival to first scheduled.", LATENCY_BUCKETS),
    "vllm:request_inference_time_seconds": ("First scheduled to last token.", LATENCY_BUCKETS),
    "vllm:request_prefill_time_seconds": ("First scheduled to first token.", LATENCY_BUCKETS),
    "vllm:request_decode_time_seconds": ("First token to last token.", LATENCY_BUCKETS),
    "slipstream:engine_step_seconds": ("Wall time of one engine step.", TOKEN_INTERVAL_BUCKETS),
}
