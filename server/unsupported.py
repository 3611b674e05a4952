"""Request fields outside the schema: refused where ignoring them would change what the client gets, else ignored.

A constraint that is dropped in silence is worse than an error, so everything known to constrain or to change
an answer is refused by name. OpenAI's harmless extras pass. Anything else is ignored, and logged once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from server.errors import ApiError
from server.schemas import Body
from server.service import UnknownFields

_STRUCTURED = "structured output is not supported yet"
_TOOLS = "tools are not supported yet"
_SAMPLER = "this sampling method is not supported"
_TEXT_ONLY = "only text goes in and out of this server"

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("tools", "functions"), _TOOLS),
    **dict.fromkeys(
        ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
         "guided_decoding_backend", "guided_whitespace_pattern", "grammar", "json_schema", "regex", "ebnf",
         "structural_tag"), _STRUCTURED
    ),
    **dict.fromkeys(
        ("typical_p", "top_a", "tfs", "top_n_sigma", "xtc_probability", "dry_multiplier", "mirostat",
         "length_penalty", "logits_processors", "custom_logit_processor", "logprob_token_ids",
         "repetition_detection", "thinking_token_budget", "stop_regex"), _SAMPLER
    ),
    **dict.fromkeys(("audio", "prompt_embeds", "input_embeds", "mm_processor_kwargs", "multi_modal_data"), _TEXT_ONLY),
    "truncate_prompt_tokens": "prompts are never cut; shorten it",
    "truncation_side": "prompts are never cut",
    "chat_template": "a template per request is not allowed; use chat_template_kwargs for its variables",
    "documents": "documents are not supported; put them in a message",
    "web_search_options": "there is no web search",
    "kv_transfer_params": "there is no KV transfer",
}  # fmt: skip


# Fields with some values that ask for what happens anyway.
CONDITIONAL: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "tool_choice": (lambda value: value == "none", _TOOLS),
    "function_call": (lambda value: value == "none", _TOOLS),
    "response_format": (lambda value: isinstance(value, dict) and value.get("type") == "text", _STRUCTURED),
    "modalities": (lambda value: value == ["text"], _TEXT_ONLY),
    "suffix": (lambda value: value == "", "inserting between two texts is not supported"),
    "echo": (lambda value: value is False, "echo is for /v1/completions"),
    "use_beam_search": (lambda value: value is False, _SAMPLER),
}

IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
     "prediction", "verbosity", "parallel_tool_calls", "request_id", "include_reasoning", "session_id")
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
            raise ApiError(400, f"Unsupported parameter: '{name}': {reason}.", param=name, code="unsupported_parameter")
        if name not in IGNORED:
            unknown.note(name)
