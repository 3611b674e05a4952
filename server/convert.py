"""From a parsed body to engine requests: defaults, sampling parameters, and the bounds that settings hold."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.types import Request, SamplingParams
from server import unsupported
from server.contract import Engine, Tokenizer
from server.diffusion import answer_length, check_echo, diffusion_params
from server.errors import ApiError, invalid
from server.prompts import Prompt, check_limit, encode_messages, encode_prompts
from server.schemas import CompletionBody, GenerationBody, default
from server.schemas_chat import ChatBody
from server.service import Service
from server.speculation import speculation_params

COMPLETION_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Job:
    """One client request. Choice i * n + j is the j-th answer to prompt i; `requests` are in this order."""

    id: str
    model: str
    created: int  # unix seconds
    engine: Engine
    prompts: tuple[Prompt, ...]
    n: int
    requests: tuple[Request, ...]
    score_only: bool = False  # the prompt is scored; what is generated is not shown

    def prompt_of(self, index: int) -> Prompt:
        return self.prompts[index // self.n]

    def index_of(self, request_id: str) -> int:
        return int(request_id.rpartition("-")[2])


async def completion_job(body: CompletionBody, service: Service) -> Job:
    """Raises ApiError for everything that the engine would not say itself."""
    engine = service.engine(body.model)
    n = _check_common(body, service)
    score_only = body.max_tokens == 0 and bool(body.echo)
    if body.max_tokens is not None and body.max_tokens < 1 and not score_only:
        raise invalid("max_tokens", "must be at least 1 (or 0 together with echo)")
    check_limit("logprobs", body.logprobs, service.settings.max_logprobs)
    check_limit("n", n, service.settings.max_n)
    prompts = await encode_prompts(body, engine, service)
    if len(prompts) * n > service.settings.max_sequences:
        raise invalid("n", f"prompts times n must be at most {service.settings.max_sequences}")
    # The engine generates at least one token. For scoring alone it is made and not shown.
    asked = default(body.max_tokens, answer_length(body, engine.info, COMPLETION_MAX_TOKENS))
    max_tokens = 1 if score_only else asked
    prompt_logprobs = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        check_echo(engine.info)
        prompt_logprobs = max(body.logprobs, prompt_logprobs or 0)
    sampling = _sampling(body, engine.tokenizer, max_tokens, body.logprobs, prompt_logprobs)
    return _job("cmpl", body, engine, prompts, sampling, score_only)


async def chat_job(body: ChatBody, service: Service) -> Job:
    """Raises ApiError for everything that the engine would not say itself."""
    engine = service.engine(body.model)
    n = _check_common(body, service)
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if asked is not None and asked < 1:
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        raise invalid(name, "must be at least 1")
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs", "needs 'logprobs': true")
    check_limit("top_logprobs", body.top_logprobs, service.settings.max_logprobs)
    check_limit("n", n, min(service.settings.max_n, service.settings.max_sequences))
    if not engine.tokenizer.has_chat_template:
        raise ApiError(
            400, "This model has no chat template; use /v1/completions.", param="messages", code="no_chat_template"
        )
    ids = await encode_messages(engine, body.messages, body, service, bool(body.add_special_tokens))
    info, rest = engine.info, max(1, engine.info.max_model_len - len(ids))
    room = rest if info.diffusion is None else min(rest, info.diffusion.defaults.canvas)
    max_tokens = default(asked, answer_length(body, info, room))
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = _sampling(body, engine.tokenizer, max_tokens, logprobs, body.prompt_logprobs)
    return _job("chatcmpl", body, engine, (Prompt(tuple(ids)),), sampling)


def _check_common(body: GenerationBody, service: Service) -> int:
    """Checks that both endpoints share; returns n."""
    n, settings = default(body.n, 1), service.settings
    if n < 1:
        raise invalid("n", "must be at least 1")
    unsupported.check(body, n, service.unknown_fields)
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "needs 'stream': true")
    if body.stop is not None and len(body.stop) > settings.max_stop:
        message = f"Invalid value for 'stop': at most {settings.max_stop} stop strings are allowed."
        raise ApiError(400, message, param="stop", code="array_above_max_length")
    check_limit("prompt_logprobs", body.prompt_logprobs, settings.max_logprobs)
    if body.prompt_logprobs is not None and body.stream:
        raise invalid("prompt_logprobs", "is not available with 'stream': true")
    return n


def _sampling(
    body: GenerationBody, tokenizer: Tokenizer, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
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
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        skip_special_tokens=default(body.skip_special_tokens, True),
        logit_bias=_logit_bias(body.logit_bias or {}),
        allowed_token_ids=None if body.allowed_token_ids is None else tuple(dict.fromkeys(body.allowed_token_ids)),
        bad_words=_bad_words(body.bad_words or [], tokenizer),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


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


def _job(
    prefix: str,
    body: GenerationBody,
    engine: Engine,
    prompts: tuple[Prompt, ...],
    sampling: SamplingParams,
    score_only: bool = False,
) -> Job:
    job_id, n = f"{prefix}-{secrets.token_hex(16)}", default(body.n, 1)
    speculation = speculation_params(body.speculation, engine.info)
    diffusion = diffusion_params(body.diffusion, engine.info)
    requests = tuple(
        Request(
            id=f"{job_id}-{i * n + j}",
            prompt_ids=prompt.ids,
            sampling=sampling,
            choice=j,
            group=f"{job_id}-{i}" if n > 1 else "",
            priority=body.priority or 0,
            cache_salt=body.cache_salt or "",
            speculation=speculation,
            diffusion=diffusion,
        )
        for i, prompt in enumerate(prompts)
        for j in range(n)
    )
    model = default(body.model, engine.info.id)
    return Job(job_id, model, int(time.time()), engine, prompts, n, requests, score_only)
