"""The frame around choices: usage, the head that all chunks of a stream share, and whole answers.

Plain dicts and not models, as they are built for every chunk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from engine.diffusion import DiffusionReport
from engine.errors import EngineDead, StepFailed
from engine.types import FinishReason, ModelInfo, SpeculationParams, SpeculationReport, TokenEvent, Usage
from server.convert import Job
from server.diffusion import diffusion_fields
from server.reasoning.manner import ThoughtMeter
from server.speculation import speculation_fields, verifies_exactly

Fields = dict[str, object]
T = TypeVar("T")


class Choices(Protocol):
    """How one endpoint writes a choice. `choices.py` has one class per endpoint."""

    @property
    def kind(self) -> str:
        """The `object` of a whole answer."""
        ...

    @property
    def chunk_kind(self) -> str: ...

    def opening(self, index: int) -> Fields | None:
        """What a stream says of a choice before its first token."""
        ...

    def pieces(self, index: int, event: TokenEvent) -> Sequence[Fields]:
        """The choices of an event, each of one chunk; none when it has nothing to tell the client."""
        ...

    def whole(self, index: int, event: TokenEvent) -> Fields:
        """The choice of an answer that is not streamed; `event` is all its events in one."""
        ...

    def extras(self, first: TokenEvent | None) -> Fields:
        """Fields beside `choices`, of a whole answer (with its first event) or of a stream's first chunk (None)."""
        ...


def finish_word(finish: FinishReason | None) -> str | None:
    """The client's word for an end, None while there is none. Raises for ends that are no answers."""
    if finish is FinishReason.ABORT:
        raise EngineDead("the request was cancelled by the server")
    if finish is FinishReason.ERROR:
        raise StepFailed("the request failed")
    return None if finish is None else finish.value


class Meter:
    """Sums over the choices of a job: tokens (every prompt once, the completions of all), drafting and denoising."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._latest: dict[int, Usage] = {}
        self._unfinished = len(job.requests)
        self._speculation: list[SpeculationReport] = []
        self._diffusion: list[DiffusionReport] = []
        self._thoughts: dict[int, ThoughtMeter] = {}

    def note(self, index: int, event: TokenEvent) -> None:
        self._latest[index] = event.usage
        if self._job.thinking is not None:
            if index not in self._thoughts:
                self._thoughts[index] = ThoughtMeter(self._job.thinking)
            self._thoughts[index].note(event)
        if event.finish is not None:
            self._unfinished -= 1
            if event.speculation is not None:
                self._speculation.append(event.speculation)
            if event.diffusion is not None:
                self._diffusion.append(event.diffusion)

    @property
    def complete(self) -> bool:
        """Has every choice ended?"""
        return not self._unfinished

    def reports(self) -> Fields:
        """`speculation` and `diffusion`, each where it is told."""
        told: Fields = {"speculation": speculation_fields(self._speculation)} if self._speculation else {}
        return told | ({"diffusion": diffusion_fields(self._diffusion)} if self._diffusion else {})

    def usage(self) -> Fields:
        prompt = sum(len(prompt.ids) for prompt in self._job.prompts)
        completion = 0 if self._job.score_only else sum(usage.completion_tokens for usage in self._latest.values())
        cached = sum(usage.cached_tokens for index, usage in self._latest.items() if index % self._job.n == 0)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": sum(own.tokens for own in self._thoughts.values())},
        }


def fingerprint(info: ModelInfo, params: SpeculationParams) -> str:
    """Changes when the same request might get another answer; tells nothing of paths."""
    verifying = (info.verifier, info.verifier_knobs, info.verifier_head, info.sample)
    exactly = verifies_exactly(params, info)
    drafting = () if exactly else (info.drafter, info.draft, info.max_draft, *verifying)
    denoising = () if info.diffusion is None else (info.diffusion,)
    sizes = (info.max_model_len, info.vocab_size, info.eos_ids)
    facts = (info.path, info.pipeline, info.quant, *sizes, *drafting, *denoising)
    return f"fp_{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"


def head(job: Job, kind: str) -> Fields:
    """The fields that are equal on all chunks of a stream."""
    return {
        "id": job.id,
        "object": kind,
        "created": job.created,
        "model": job.model,
        "system_fingerprint": fingerprint(job.engine.info, job.requests[0].speculation),
    }


def join(events: Sequence[TokenEvent]) -> TokenEvent:
    """One event in place of all events of a request."""
    last = events[-1]
    return TokenEvent(
        request_id=last.request_id,
        token_ids=_flat(event.token_ids for event in events),
        text="".join(event.text for event in events),
        usage=last.usage,
        offsets=_flat(event.offsets for event in events),
        logprobs=_flat(event.logprobs or () for event in events),
        prompt_logprobs=events[0].prompt_logprobs,
        finish=last.finish,
        stop_reason=last.stop_reason,
        speculation=last.speculation,
        diffusion=last.diffusion,
        origins=None if last.origins is None else "".join(event.origins or "" for event in events),
        rounds=None if last.rounds is None else _flat(event.rounds or () for event in events),
        canvas=_flat(event.canvas for event in events),
    )


def whole_answer(job: Job, choices: Choices, events: Sequence[Sequence[TokenEvent]]) -> Fields:
    """The body of an answer that is not streamed; `events` holds those of each choice, in order.

    Raises StepFailed or EngineDead if a choice did not end well.
    """
    joined = [join(own) for own in events]
    meter = Meter(job)
    for index, event in enumerate(joined):
        meter.note(index, event)
    return {
        **head(job, choices.kind),
        "choices": [choices.whole(index, event) for index, event in enumerate(joined)],
        "usage": meter.usage(),
        **meter.reports(),
        **choices.extras(joined[0]),
    }


def _flat(parts: Iterable[Sequence[T]]) -> tuple[T, ...]:
    return tuple(item for part in parts for item in part)
