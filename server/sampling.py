"""From a body to sampling parameters."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from engine.types import SamplingParams
from server.contract import Tokenizer
from server.errors import ApiError, invalid
from server.schemas import GenerationBody, SamplingBody, default
from server.schemas_sampling import RepetitionDetection


def check_stops(body: SamplingBody, most: int) -> None:
    """Raises ApiError where there are too many."""
    for name, stops in (("stop", body.stop), ("stop_regex", body.stop_regex)):
        if stops is not None and len(stops) > most:
            message = f"Invalid value for '{name}': at most {most} stop strings are allowed."
            raise ApiError(400, message, param=name, code="array_above_max_length")


def sampling_params(
    body: GenerationBody, tokenizer: Tokenizer, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    """`logprobs` and `prompt_logprobs` are counts of alternatives. Raises ApiError."""
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise invalid("min_tokens", f"must be at most max_tokens, which is {max_tokens}")
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=default(body.temperature, 1.0),
        top_p=default(body.top_p, 1.0),
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=default(body.repetition_penalty, 1.0),
        seed=default(body.seed, secrets.randbits(63)),
        min_tokens=min_tokens,
        ignore_eos=bool(body.ignore_eos),
        stop=tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        stop_regex=tuple(body.stop_regex or ()),
        repetition=_repetition(body.repetition_detection),
        include_stop_str_in_output=bool(body.include_stop_str_in_output or body.no_stop_trim),
        skip_special_tokens=default(body.skip_special_tokens, True),
        logit_bias=_logit_bias(body.logit_bias or {}),
        allowed_token_ids=None if body.allowed_token_ids is None else tuple(dict.fromkeys(body.allowed_token_ids)),
        bad_words=_bad_words(body.bad_words or [], tokenizer),
        logprobs=logprobs,
        logprob_token_ids=_named(body, logprobs),
        prompt_logprobs=prompt_logprobs,
    )


def _named(body: GenerationBody, logprobs: int | None) -> tuple[int, ...]:
    ids = tuple(dict.fromkeys(body.logprob_token_ids or ()))
    if ids and logprobs is None:
        raise invalid("logprob_token_ids", "needs 'logprobs'")
    return ids


def _logit_bias(biases: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    pairs: dict[int, float] = {}
    for key, bias in biases.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise invalid("logit_bias", f"keys must be token ids; got {key[:32]!a}")
        pairs[int(key)] = float(bias)
    return tuple(pairs.items())


def _bad_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as it is written and as it stands after a space, which mostly are other tokens."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word, " " + word.lstrip()):
            ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            if ids:
                found[ids] = None
    return tuple(found)


def _repetition(asked: RepetitionDetection | None) -> tuple[int, int, int] | None:
    sizes = None if asked is None else asked.sizes()
    if sizes is not None and sizes[2] < 2:
        raise invalid("repetition_detection.min_count", "must be at least 2")
    if sizes is not None and sizes[0] > sizes[1]:
        raise invalid("repetition_detection.min_pattern_size", "must be at most max_pattern_size")
    return sizes
