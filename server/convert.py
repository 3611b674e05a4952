"""From a parsed body to engine requests: defaults, sampling parameters, and the bounds that settings hold."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field, replace

from engine.types import Request, SamplingParams
from server import unsupported
from server.contract import Engine
from server.diffusion import answer_length, check_echo, diffusion_params
from server.echo import EchoManner
from server.errors import ApiError, invalid
from server.fragments import Manner, Plain
from server.prompts import Prompt, check_limit, cut, encode_messages, encode_prompts
from server.reasoning.manner import Thinking, ThinkingManner
from server.reasoning.settle import budget_of, manner_of, settle_chat, text_budget
from server.sampling import check_stops, sampling_params
from server.schemas import CompletionBody, GenerationBody, default
from server.schemas_chat import ChatBody
from server.service import Service
from server.speculation import speculation_params
from server.structured import constrained
from server.tools.plan import tool_plan, wanted_tools

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
    manner: Manner = field(default_factory=Plain)  # how the texts of the choices are read
    thinking: Thinking | None = None  # where thoughts are told apart
    called: str = "tool_calls"  # the finish_reason of a choice that called a tool and ended by itself

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
    prompts = tuple(cut(prompt, body, engine.info, max_tokens) for prompt in prompts)
    prompt_logprobs = body.prompt_logprobs
    if body.echo and body.logprobs is not None:
        check_echo(engine.info)
        if body.logprob_token_ids:
            raise invalid("logprob_token_ids", "is not available with 'echo': true")
        prompt_logprobs = max(body.logprobs, prompt_logprobs or 0)
    sampling = sampling_params(body, engine.tokenizer, max_tokens, body.logprobs, prompt_logprobs)
    sampling = await constrained(sampling, body, engine)
    job = _job("cmpl", body, engine, prompts, sampling, score_only)
    if budget_of(body, engine.info) is None:
        return job
    budgets = [text_budget(body, engine.info, request.prompt_ids) for request in job.requests]
    pairs = zip(job.requests, budgets, strict=True)
    return replace(job, requests=tuple(replace(one, sampling=replace(sampling, thinking=own)) for one, own in pairs))


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
    wanted, special = wanted_tools(body, engine.info), bool(body.add_special_tokens)
    ids = await encode_messages(engine, body.messages, body, service, special, wanted.tools)
    prompt = cut(Prompt(tuple(ids)), body, engine.info, default(asked, 1))
    ids = [*prompt.ids]
    info, rest = engine.info, max(1, engine.info.max_model_len - len(ids))
    room = rest if info.diffusion is None else min(rest, info.diffusion.defaults.canvas)
    max_tokens = default(asked, answer_length(body, info, room))
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = sampling_params(body, engine.tokenizer, max_tokens, logprobs, body.prompt_logprobs)
    sampling = await constrained(sampling, body, engine)
    plan = await tool_plan(wanted, sampling.grammar, engine)
    prefilled = (body.messages[-1].content or "") if body.continue_final_message else ""
    sampling = replace(sampling, grammar=plan.grammar, shown_token_ids=plan.shown)
    sampling, thinking = settle_chat(body, info, engine.tokenizer, ids, sampling, prefilled)
    job = _job("chatcmpl", body, engine, (prompt,), sampling)
    manner = _told(body, prefilled, manner_of(body, thinking, plan.manner))
    return replace(job, manner=manner, thinking=thinking, called=plan.called)


def _check_common(body: GenerationBody, service: Service) -> int:
    """Checks that both endpoints share; returns n."""
    n, settings = default(body.n, 1), service.settings
    if n < 1:
        raise invalid("n", "must be at least 1")
    unsupported.check(body, n, service.unknown_fields)
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "needs 'stream': true")
    check_stops(body, settings.max_stop)
    check_limit("prompt_logprobs", body.prompt_logprobs, settings.max_logprobs)
    if body.prompt_logprobs is not None and body.stream:
        raise invalid("prompt_logprobs", "is not available with 'stream': true")
    return n


def _told(body: ChatBody, prefilled: str, manner: Manner) -> Manner:
    """The manner of a chat whose answer may begin with the message that it continues."""
    if not body.echo:
        return manner
    if not body.continue_final_message:
        raise invalid("echo", "needs 'continue_final_message': true, and a last message to continue")
    if isinstance(manner, ThinkingManner):  # it will read the beginning of the span itself
        manner = replace(manner, thinking=replace(manner.thinking, opened=False))
    return EchoManner(prefilled, manner)


def _job(
    prefix: str,
    body: GenerationBody,
    engine: Engine,
    prompts: tuple[Prompt, ...],
    sampling: SamplingParams,
    score_only: bool = False,
) -> Job:
    job_id, n = f"{prefix}-{body.request_id or secrets.token_hex(16)}", default(body.n, 1)
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
