"""The engine's own guard: no request that passes here can fail for what it asks.

The server checks types and bounds of the JSON too; this is what the offline `LLM` and every other caller share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from engine import denoising, speculation
from engine.errors import ContextLengthExceeded, InvalidRequest
from engine.tokenizer.repetition import MAX_PATTERN_SIZE
from engine.tokenizer.stop_regex import compile_stop
from engine.types import ModelInfo, Request, SamplingParams
from engine.validate_reading import settle_reading

MAX_LOGPROBS = 20  # alternatives per token
MAX_LOGPROB_IDS = 128
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_STOP_PATTERNS = 4
MAX_LISTED = 1024  # entries of logit_bias, stop_token_ids and bad_words
MAX_BAD_WORD_TOKENS = 64
GREEDY_BELOW = 1e-5  # a positive temperature under this would overflow the logits; it is greedy in all but name
INT64 = 1 << 63


@dataclass(frozen=True, slots=True)
class Rule:
    """`holds` says whether the parameters are fine; if not, the client reads "{param} {text}"."""

    param: str
    text: str
    holds: Callable[[SamplingParams, ModelInfo], bool]


def _within(value: object, low: float, high: float) -> bool:
    """A real number in [low, high]; never true of NaN or a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _integer(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _optional_integer(value: object, low: int, high: int) -> bool:
    return value is None or _integer(value, low, high)


def _ids(ids: Iterable[object], info: ModelInfo) -> bool:
    """Are all of them token ids of the model? Built from C loops: a prompt may have 100,000."""
    ids = tuple(ids)
    return not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < info.vocab_size)  # type: ignore[type-var, operator]  # all ints by then


def _biases(params: SamplingParams, info: ModelInfo) -> bool:
    pairs = params.logit_bias
    return _ids((token for token, _ in pairs), info) and all(_within(bias, -100, 100) for _, bias in pairs)


def _utf8(text: object) -> bool:
    """Can it be encoded at all? A JSON escape can make half of a surrogate pair, which can't."""
    if not isinstance(text, str):
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


RULES = (
    Rule("max_tokens", "must be an integer of at least 1", lambda p, _: _integer(p.max_tokens, 1, INT64 * 2)),
    Rule("temperature", "must be between 0 and 100", lambda p, _: _within(p.temperature, 0, 100)),
    Rule("top_p", "must be above 0 and at most 1", lambda p, _: _within(p.top_p, 0, 1) and p.top_p > 0),
    Rule("top_k", "must be 0 (off) or a positive integer", lambda p, _: _integer(p.top_k, 0, INT64)),
    Rule("min_p", "must be between 0 and 1", lambda p, _: _within(p.min_p, 0, 1)),
    Rule("presence_penalty", "must be between -2 and 2", lambda p, _: _within(p.presence_penalty, -2, 2)),
    Rule("frequency_penalty", "must be between -2 and 2", lambda p, _: _within(p.frequency_penalty, -2, 2)),
    Rule("repetition_penalty", "must be between 0.01 and 100", lambda p, _: _within(p.repetition_penalty, 0.01, 100)),
    Rule("seed", "must be a 64-bit integer", lambda p, _: _integer(p.seed, -INT64, INT64 - 1)),
    Rule("min_tokens", "must be between 0 and max_tokens", lambda p, _: _integer(p.min_tokens, 0, p.max_tokens)),
    Rule(
        "logprobs", f"must be between 0 and {MAX_LOGPROBS}", lambda p, _: _optional_integer(p.logprobs, 0, MAX_LOGPROBS)
    ),
    Rule(
        "prompt_logprobs",
        f"must be between 0 and {MAX_LOGPROBS}",
        lambda p, _: _optional_integer(p.prompt_logprobs, 0, MAX_LOGPROBS),
    ),
    Rule(
        "logprob_token_ids",
        f"must hold at most {MAX_LOGPROB_IDS} ids of the vocabulary, each once",
        lambda p, info: (
            len(p.logprob_token_ids) <= MAX_LOGPROB_IDS
            and _ids(p.logprob_token_ids, info)
            and len(set(p.logprob_token_ids)) == len(p.logprob_token_ids)
        ),
    ),
    Rule("logprob_token_ids", "needs logprobs", lambda p, _: not p.logprob_token_ids or p.logprobs is not None),
    Rule("stop", f"may have at most {MAX_STOPS} entries", lambda p, _: len(p.stop) <= MAX_STOPS),
    Rule("stop", "must hold strings of valid Unicode", lambda p, _: all(map(_utf8, p.stop))),
    Rule(
        "stop",
        f"must hold strings of 1 to {MAX_STOP_CHARS} characters",
        lambda p, _: all(1 <= len(text) <= MAX_STOP_CHARS for text in p.stop),
    ),
    Rule(
        "stop_regex",
        f"may have at most {MAX_STOP_PATTERNS} entries",
        lambda p, _: len(p.stop_regex) <= MAX_STOP_PATTERNS,
    ),
    Rule(
        "repetition_detection",
        f"must have 1 <= min_pattern_size <= max_pattern_size <= {MAX_PATTERN_SIZE} and 2 <= min_count <= {MAX_LISTED}",
        lambda p, _: (
            p.repetition is None
            or (1 <= p.repetition[0] <= p.repetition[1] <= MAX_PATTERN_SIZE and 2 <= p.repetition[2] <= MAX_LISTED)
        ),
    ),
    Rule("stop_token_ids", f"may have at most {MAX_LISTED} entries", lambda p, _: len(p.stop_token_ids) <= MAX_LISTED),
    Rule("stop_token_ids", "must hold ids of the vocabulary", lambda p, info: _ids(p.stop_token_ids, info)),
    Rule("logit_bias", f"may have at most {MAX_LISTED} entries", lambda p, _: len(p.logit_bias) <= MAX_LISTED),
    Rule("logit_bias", "must map ids of the vocabulary to values between -100 and 100", _biases),
    Rule(
        "allowed_token_ids",
        "must hold at least one id, and only ids of the vocabulary",
        lambda p, info: (
            p.allowed_token_ids is None
            or (0 < len(p.allowed_token_ids) <= info.vocab_size and _ids(p.allowed_token_ids, info))
        ),
    ),
    Rule(
        "thinking_token_budget",
        "must be an integer of at least 0",
        lambda p, _: p.thinking is None or _integer(p.thinking.tokens, 0, INT64),
    ),
    Rule(
        "thinking_token_budget",
        "is of no use here: this model has no tokens around its thinking",
        lambda p, info: p.thinking is None or info.thinking is not None,
    ),
    Rule(
        "thinking_token_budget",
        "is not supported for models that denoise",
        lambda p, info: p.thinking is None or info.diffusion is None,
    ),
    Rule(
        "thinking_token_budget",
        "needs the token that ends the thinking among allowed_token_ids",
        lambda p, info: (
            p.thinking is None or p.allowed_token_ids is None or (info.thinking or (0, 0))[1] in p.allowed_token_ids
        ),
    ),
    Rule(
        "structured_outputs",
        "are not supported for models that denoise",
        lambda p, info: p.grammar is None or info.diffusion is None,
    ),
    Rule(
        "allowed_token_ids",
        "can't go with structured output, which says itself what may come",
        lambda p, _: p.grammar is None or p.allowed_token_ids is None,
    ),
    Rule(
        "ignore_eos",
        "can't go with structured output, which is over when it is complete",
        lambda p, _: p.grammar is None or not p.ignore_eos,
    ),
    Rule("bad_words", f"may have at most {MAX_LISTED} entries", lambda p, _: len(p.bad_words) <= MAX_LISTED),
    Rule(
        "bad_words",
        f"must be sequences of 1 to {MAX_BAD_WORD_TOKENS} ids of the vocabulary",
        lambda p, info: all(0 < len(word) <= MAX_BAD_WORD_TOKENS and _ids(word, info) for word in p.bad_words),
    ),
)


def validate(request: Request, info: ModelInfo, *, param: str = "prompt") -> Request:
    """The request as it can be run: `max_tokens` is cut to the room that there is, verifier and denoising are settled.

    `param` is the client's name of the prompt in errors ("messages" for a chat). Raises InvalidRequest, and
    ContextLengthExceeded when the prompt alone leaves no room for a token.
    """
    sampling = request.sampling
    if request.reading is not None:
        return _validate_reading(request, info, param)
    for rule in RULES:
        if not rule.holds(sampling, info):
            raise InvalidRequest(f"{rule.param} {rule.text}", param=rule.param)
    _check_patterns(sampling)
    _check_envelope(request)
    drafting = speculation.settle(request.speculation, info)
    length = len(request.prompt_ids)
    if length == 0:
        raise InvalidRequest(f"{param} must hold at least one token", param=param)
    if length >= info.max_model_len:
        raise ContextLengthExceeded(info.max_model_len, length, sampling.max_tokens, param)
    if not _ids(request.prompt_ids, info):
        raise InvalidRequest(f"{param} must hold ids of the vocabulary, from 0 to {info.vocab_size - 1}", param=param)
    diffusion = denoising.settle(request, info, param)
    _check_satisfiable(sampling, info)
    room = min(sampling.max_tokens, diffusion.canvas or info.max_model_len - length)
    fitted = replace(
        sampling,
        max_tokens=room,
        min_tokens=min(sampling.min_tokens, room),
        temperature=0.0 if sampling.temperature < GREEDY_BELOW else float(sampling.temperature),
        top_k=0 if sampling.top_k >= info.vocab_size else sampling.top_k,
        thinking=None if sampling.thinking is None else replace(sampling.thinking, around=info.thinking),
    )
    return replace(request, sampling=fitted, speculation=drafting, diffusion=diffusion)


def _check_patterns(params: SamplingParams) -> None:
    for pattern in params.stop_regex:
        try:
            compile_stop(pattern)
        except ValueError as error:
            raise InvalidRequest(f"stop_regex {error}", param="stop_regex") from error


def _validate_reading(request: Request, info: ModelInfo, param: str) -> Request:
    _check_envelope(request)
    if not request.prompt_ids:
        raise InvalidRequest(f"{param} must hold at least one token", param=param)
    if not _ids(request.prompt_ids, info):
        raise InvalidRequest(f"{param} must hold ids of the vocabulary, from 0 to {info.vocab_size - 1}", param=param)
    return settle_reading(request, info, param)


def _check_envelope(request: Request) -> None:
    """What travels beside the sampling parameters must survive the trip to the engine process."""
    for name in ("id", "group", "cache_salt"):
        if not _utf8(getattr(request, name)):
            raise InvalidRequest(f"{name} must be a string of valid Unicode", param=name)
    if not _integer(request.priority, -INT64, INT64 - 1):
        raise InvalidRequest("priority must be a 64-bit integer", param="priority")


def _check_satisfiable(params: SamplingParams, info: ModelInfo) -> None:
    """Refuse what plainly leaves no token to draw; what becomes impossible later fails that request alone."""
    banned = {word[0] for word in params.bad_words if len(word) == 1}
    if info.diffusion is not None:
        banned.add(info.diffusion.spec.mask_id)
    if params.min_tokens > 0:
        banned.update(params.stop_token_ids, () if params.ignore_eos else info.eos_ids)
    allowed = range(info.vocab_size) if params.allowed_token_ids is None else params.allowed_token_ids
    if all(token in banned for token in allowed):
        raise InvalidRequest(
            "bad_words and min_tokens together ban every token that may be drawn",
            param="bad_words" if params.allowed_token_ids is None else "allowed_token_ids",
        )
