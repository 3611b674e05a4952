"""What one request has produced: from the engine's news of it to the events its client reads. No torch, no sockets."""

from __future__ import annotations

import time

from engine.diffusion import DiffusionReport
from engine.front.canvas_trace import CanvasTrace
from engine.tokenizer.detokenizer import Detokenizer
from engine.tokenizer.tokenizer import Tokenizer
from engine.types import (
    FinishReason,
    Passes,
    Request,
    RequestSummary,
    SeqUpdate,
    SpeculationReport,
    TokenEvent,
    TokenLogprob,
    Usage,
)


class Rounds:
    """What drafting did for one request.

    The tokens of a round are the drafted ones that stood, then the target's own. Where the answer ends inside a round,
    what is behind its end counts as little as it is told: `accepted` and `bias` are of tokens of the answer, `drafted`
    is all that was verified for it.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._tokens = 0
        self._drafted = 0
        self._histogram: list[int] = []
        self._bias = 0.0

    def note(self, update: SeqUpdate, kept: int) -> None:
        """`kept`: how many of the update's tokens belong to the answer."""
        self._tokens += kept
        self._bias += sum(update.bias[:kept])
        if not update.drafted:
            return
        self._drafted += update.drafted
        stood = min(update.accepted, kept)
        self._histogram.extend([0] * (stood + 1 - len(self._histogram)))
        self._histogram[stood] += 1

    def report(self) -> SpeculationReport:
        accepted = sum(stood * rounds for stood, rounds in enumerate(self._histogram))
        params, greedy = self._request.speculation, self._request.sampling.temperature == 0
        relaxed = params.bias_bound > 0
        return SpeculationReport(
            rounds=sum(self._histogram),
            drafted=self._drafted,
            accepted=accepted,
            histogram=tuple(self._histogram),
            tokens=self._tokens,
            verifier=params.verifier,
            knobs=params.knobs,
            decoder=("relaxed_greedy" if greedy else "relaxed") if relaxed else "target",
            bias_bound=None if relaxed and greedy else params.bias_bound,
            bias=self._bias,
        )


def origins(update: SeqUpdate, kept: int) -> str:
    """The letters of its first `kept` tokens, see TokenEvent."""
    if not update.drafted:
        return "p" * kept
    own = "b" if update.leaf or update.accepted == update.drafted else "c"
    return ("d" * update.accepted + own)[:kept]


def rounds(update: SeqUpdate, kept: int) -> tuple[tuple[int, int], ...]:
    """(drafted, stood) of its round, if it was one."""
    return ((update.drafted, min(update.accepted, kept)),) if update.drafted and kept else ()


class RequestOutput:
    """Detokenizes, cuts at stop strings and keeps the times of one request. Times are in `time.monotonic()`."""

    def __init__(self, request: Request, tokenizer: Tokenizer, n: int = 1) -> None:
        self.request = request
        self.n = n
        self.started = False  # the engine has said something about it
        self.last_news = request.arrival
        self.num_tokens = 0  # completion tokens that count
        self._detokenizer = Detokenizer(tokenizer, request.sampling, request.prompt_ids)
        self._rounds = Rounds(request)
        self._passes = Passes()
        self._canvas = CanvasTrace(request) if request.diffusion.trace else None
        self._prompt_logprobs: list[TokenLogprob] = []
        self._cached_tokens = 0
        self._preemptions = 0
        self._detokenize = 0.0  # seconds
        self._scheduled_at: float | None = None
        self._first_token_at: float | None = None

    @property
    def usage(self) -> Usage:
        return Usage(len(self.request.prompt_ids), self.num_tokens, self._cached_tokens)

    def take(self, update: SeqUpdate, now: float) -> TokenEvent | None:
        """The event of an update that is no error; None when there is nothing to tell yet.

        An event with a `finish` is the last one. If the update itself had none, a stop string has matched and
        the engine does not know yet that the request is over.
        """
        self._note(update)
        began = time.perf_counter()
        piece = self._detokenizer.push(
            update.token_ids, final=update.finish is not None, stop_token=update.finish is FinishReason.STOP
        )
        self._detokenize += time.perf_counter() - began
        first = self.num_tokens == 0
        self.num_tokens += piece.num_tokens
        self._rounds.note(update, piece.num_tokens)
        if piece.num_tokens:
            self._first_token_at = now if self._first_token_at is None else self._first_token_at
            self.last_news = now
        finish = FinishReason.STOP if piece.stop is not None else update.finish
        canvas = () if self._canvas is None else self._canvas.take(update.canvas, finish, self.num_tokens)
        if not (piece.num_tokens or piece.text or finish or canvas):
            return None
        traced = self.request.speculation.trace
        return TokenEvent(
            request_id=self.request.id,
            token_ids=update.token_ids[: piece.num_tokens],
            text=piece.text,
            usage=self.usage,
            offsets=piece.offsets,
            logprobs=None if update.logprobs is None else update.logprobs[: piece.num_tokens],
            prompt_logprobs=self._report_prompt() if first else None,
            finish=finish,
            stop_reason=piece.stop if piece.stop is not None else update.stop_token_id,
            speculation=self._rounds.report() if finish and self.request.speculation.report else None,
            diffusion=self._denoised() if finish and self.request.diffusion.report else None,
            origins=origins(update, piece.num_tokens) if traced else None,
            rounds=rounds(update, piece.num_tokens) if traced else None,
            canvas=canvas,
            reading=update.reading,
        )

    def _note(self, update: SeqUpdate) -> None:
        self.started = True
        self._preemptions = update.preemptions
        self._cached_tokens = update.cached_tokens
        self._scheduled_at = update.scheduled_at or self._scheduled_at
        self._passes = update.passes or self._passes
        if update.prompt_logprobs and self.num_tokens == 0:
            self._prompt_logprobs.extend(update.prompt_logprobs)

    def _denoised(self) -> DiffusionReport:
        """What all steps up to the end of the answer took; their tokens up to where it was cut."""
        passes = self._passes
        return DiffusionReport(
            params=self.request.diffusion,
            forwards=passes.forwards,
            draft_forwards=passes.draft_forwards,
            verifies=passes.verifies,
            remasked=passes.remasked,
            tokens=self.num_tokens,
        )

    def _report_prompt(self) -> tuple[TokenLogprob | None, ...] | None:
        if self.request.sampling.prompt_logprobs is None:
            return None
        report, self._prompt_logprobs = (None, *self._prompt_logprobs), []
        return report

    def summary(self, finish: FinishReason, now: float) -> RequestSummary:
        """The durations of a request that ends `now`; phases it did not reach are 0 long."""
        arrival = self.request.arrival
        scheduled = now if self._scheduled_at is None else self._scheduled_at
        first = now if self._first_token_at is None else self._first_token_at
        return RequestSummary(
            usage=self.usage,
            finish=finish,
            max_tokens=self.request.sampling.max_tokens,
            n=self.n,
            e2e=now - arrival,
            queue=max(0.0, scheduled - arrival),
            prefill=max(0.0, first - scheduled),
            decode=now - first,
            first_token=None if self._first_token_at is None else first - arrival,
            preemptions=self._preemptions,
            request_id=self.request.id,
            speculation=self._rounds.report(),
            passes=self._passes,
            detokenize=self._detokenize,
        )


def merge(events: list[TokenEvent]) -> TokenEvent:
    """One event in place of several that follow each other in one request."""
    if len(events) == 1:
        return events[0]
    first, last = events[0], events[-1]
    asked = first.logprobs is not None or last.logprobs is not None
    return TokenEvent(
        request_id=last.request_id,
        token_ids=tuple(token for event in events for token in event.token_ids),
        text="".join(event.text for event in events),
        usage=last.usage,
        offsets=tuple(offset for event in events for offset in event.offsets),
        logprobs=tuple(entry for event in events for entry in event.logprobs or ()) if asked else None,
        prompt_logprobs=first.prompt_logprobs,
        finish=last.finish,
        stop_reason=last.stop_reason,
        speculation=last.speculation,
        diffusion=last.diffusion,
        origins=None if last.origins is None else "".join(event.origins or "" for event in events),
        rounds=None if last.rounds is None else tuple(pair for event in events for pair in event.rounds or ()),
        canvas=tuple(news for event in events for news in event.canvas),
    )
