"""Request fields outside the schema: refused where ignoring them would change what the client gets, else ignored.

A constraint that is dropped in silence is worse than an error, so everything known to constrain or to change
an answer is refused by name. OpenAI's harmless extras pass. Anything else is ignored, and logged once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from server.errors import refused
from server.schemas import Body
from server.service import UnknownFields

_STRUCTURED = "this endpoint does not take it"
_TOOLS = "tools are for /v1/chat/completions"
_FUNCTIONS = "use 'tools' and 'tool_choice', which took its place"
_SAMPLER = "this sampling method is not supported"
_TEXT_ONLY = "only text goes in and out of this server"

REFUSED: Mapping[str, str] = {
    "tools": _TOOLS,
    "functions": _FUNCTIONS,
    **dict.fromkeys(
        ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "json_schema",
         "guided_whitespace_pattern", "grammar", "regex", "ebnf"), _STRUCTURED
    ),
    **dict.fromkeys(
        ("structural_tag", "response_schema", "guided_decoding", "guided_options_request", "grammar_lazy",
         "grammar_triggers"), "use response_format or structured_outputs"
    ),
    **dict.fromkeys(
        ("typical_p", "top_a", "tfs", "tfs_z", "top_n_sigma", "xtc_probability", "xtc_threshold", "dry_multiplier",
         "mirostat", "mirostat_mode", "epsilon_cutoff", "eta_cutoff", "penalty_alpha", "no_repeat_ngram_size",
         "dynatemp_range", "logits_processors", "custom_logit_processor", "custom_params", "vllm_xargs"), _SAMPLER
    ),
    **dict.fromkeys(("guidance_scale", "cfg_scale", "negative_prompt"), "there is no guidance by a second prompt"),
    **dict.fromkeys(("n_predict", "max_new_tokens", "max_length"), "use max_tokens"),
    **dict.fromkeys(("min_new_tokens", "min_length"), "use min_tokens"),
    "do_sample": "use temperature, 0 for the likeliest tokens",
    "repeat_penalty": "use repetition_penalty",
    "input_ids": "token ids go into 'prompt' of /v1/completions",
    "extra_key": "use cache_salt",
    **dict.fromkeys(("lora_path", "lora", "adapter_id"), "adapters are not supported"),
    **dict.fromkeys(("session_params", "bootstrap_host", "bootstrap_port", "bootstrap_room", "ec_transfer_params"),
                    "there is no transfer between servers"),
    **dict.fromkeys(("audio", "images", "videos", "prompt_embeds",
                      "input_embeds", "mm_processor_kwargs", "multi_modal_data", "mm_payload",
                     "media_io_kwargs"), _TEXT_ONLY),
    "chat_template": "a template per request is not allowed; use chat_template_kwargs for its variables",
    "documents": "documents are not supported; put them in a message",
    "web_search_options": "there is no web search",
    "kv_transfer_params": "there is no KV transfer",
}  # fmt: skip


# Fields with some values that ask for what happens anyway.
CONDITIONAL: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "tool_choice": (lambda value: value == "none", _TOOLS),
    "function_call": (lambda value: value == "none", _FUNCTIONS),
    "response_format": (lambda value: isinstance(value, dict) and value.get("type") == "text", _STRUCTURED),
    "modalities": (lambda value: value == ["text"], _TEXT_ONLY),
    "suffix": (lambda value: value == "", "inserting between two texts is not supported"),
    "use_beam_search": (lambda value: value is False, _SAMPLER),
    "early_stopping": (lambda value: value is False, _SAMPLER),
    "num_beams": (lambda value: value == 1, _SAMPLER),
    "length_penalty": (lambda value: value == 1, "it is for beam search, which is not supported"),
    "watermarking": (lambda value: value is False, "answers are not watermarked"),
    "return_hidden_states": (lambda value: value is False, "hidden states are not told"),
    "return_routed_experts": (lambda value: value is False, "experts are not told"),
    "return_mm_kwargs": (lambda value: value is False, _TEXT_ONLY),
}

IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
     "prediction", "verbosity", "parallel_tool_calls", "session_id", "return_token_offsets",
     "routed_experts_prompt_start", "guided_decoding_backend")
)  # fmt: skip


def check(body: Body, n: int, unknown: UnknownFields) -> None:
    """Raises ApiError 400 for a field that can't be ignored; notes the names that nobody knows."""
    for name, value in body.extras().items():
        passes, reason = CONDITIONAL.get(name, (None, REFUSED.get(name)))
        if name == "best_of":
            passes, reason = (lambda v: type(v) is int and v == n), "choosing the best of several is not supported"
        if passes is not None and passes(value):
            continue
        if reason is not None:
            raise refused(name, reason)
        if name not in IGNORED:
            unknown.note(name)
