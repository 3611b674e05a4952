"""An engine without a model, for the HTTP side: real tokenizer, validation, detokenizer and event streams.

Only the model is made up: each request gets scripted tokens, one per step or in drafted rounds, and a step happens
whenever the event loop has nothing better to do, or when a test says `release`.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from engine.diffusion import CanvasStep, DiffusionInfo
from engine.errors import DuplicateRequest, EngineDead, Overloaded, SlipstreamError
from engine.front.event_stream import EventStream
from engine.front.in_flight import InFlight
from engine.grammar import Grammar
from engine.protocols import EngineObserver
from engine.reading import Law, Readout
from engine.structured.check import GrammarCheck
from engine.structured.wire import Words
from engine.tokenizer.chat_template import ChatTemplate
from engine.tokenizer.tokenizer import Tokenizer
from engine.types import EngineStats, FinishReason, Health, ModelInfo, Passes, Phase, Request, SeqUpdate, TokenLogprob
from engine.validate import validate
from engine.verification import Knob, VerifierCard
from tests.server.fake_operator import FakeOperator

# Cards like those of the real verifiers, which need torch to be loaded.
VERIFIERS = (
    VerifierCard("strict", True, "exact", exact=True),
    VerifierCard("rejection", True, "a ratio", drawn=True),
    VerifierCard(
        "ensemble",
        False,
        "a mixture",
        (Knob("target_weight", 0.7, 0.0, 1.0, "weight of the target", neutral=1.0),),
        drawn=True,
    ),
    VerifierCard("bounded", False, "a bound", (Knob("epsilon", 0.1, 0.0, 1.0, "the bound", neutral=0.0),), drawn=True),
    VerifierCard(
        "typical",
        False,
        "a threshold",
        (Knob("posterior_threshold", 0.3, 0.0, 1.0, "one"), Knob("posterior_alpha", 0.09, 0.0, 100.0, "two")),
    ),
    VerifierCard(
        "top_k_gap",
        False,
        "a gap",
        (Knob("relaxed_topk", 8, 1, 1000, "so many", whole=True), Knob("relaxed_delta", 0.5, 0.0, 100.0, "the gap")),
    ),
)
BOS, EOS = 256, 257
VOCAB = 260  # bytes, <bos>, <eos>, and two tokens of several bytes: "Hello" and " world"
HELLO, WORLD = 258, 259
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'boom' %}{{ raise_exception('no') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if extra %}[{{ extra }}]{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(
    *, template: str | None = TEMPLATE, bos: bool = False, marks: Sequence[str] = (), special: bool = True
) -> Tokenizer:
    """Byte-level, nearly one token per byte: characters and stop strings fall across token borders.

    `marks` get tokens of their own, which are `special` or not.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    backend.add_tokens(["Hello", " world"])
    (backend.add_special_tokens if special else backend.add_tokens)(list(marks))
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    named = {"bos_token": "<bos>", "eos_token": "<eos>"}
    chat = None if template is None else ChatTemplate({"default": template}, named)
    return Tokenizer(backend, (EOS,), named, chat, details={"chat_template": template} if template else None)


class FakeEngine:
    """Speaks `server.contract.Engine`. `answer` makes the tokens of a request; EOS at their end is up to it.

    With `stands` it drafts 4 tokens a round, of which so many stand: in the first round, in the second, and around.
    Where its verifier is lossy, each of these has a bias of 1/8, and what the target says in place of a draft 1/4.
    With `diffusion` it is one that denoises: of its steps, each of one pass, only every other one brings tokens, three
    at once, and the fourth takes one back that it had drafted. A trace tells of the three in the step before.
    """

    def __init__(
        self,
        name: str = "tiny",
        *,
        answer: str | Sequence[int] | Callable[[Request], Sequence[int]] = "Hello, wörld!",
        tokenizer: Tokenizer | None = None,
        max_model_len: int = 512,
        stands: Sequence[int] = (),
        verifier: str = "strict",
        max_bias: float = 1.0,
        diffusion: DiffusionInfo | None = None,
    ) -> None:
        self.tokenizer = tokenizer or make_tokenizer()
        self.info = ModelInfo(name, "/secret/path", max_model_len, VOCAB, (EOS,), 16, 100, 1_700_000_000, "fp16", "ar")
        tool_parser, tool_template = self.tokenizer.tool_form("auto")
        self.info = replace(self.info, tool_parser=tool_parser, tool_template=tool_template)
        if stands:
            knobs = next(card.settle({}) for card in VERIFIERS if card.name == verifier)
            self.info = replace(self.info, drafter="dflash", max_draft=4, verifier=verifier, verifier_knobs=knobs)
            self.info = replace(self.info, verifiers=VERIFIERS, max_bias=max_bias)
        if diffusion is not None:
            self.info = replace(self.info, diffusion=diffusion, pipeline="masked_diffusion")
        self.stands = stands
        self.answer = answer
        self.observers: list[EngineObserver] = []
        self.in_flight = InFlight(self.observers)
        self.asked = FakeOperator()
        self.grammars = GrammarCheck(lambda: Words.of(self.tokenizer, self.info.vocab_size, self.info.eos_ids))
        self.stats = EngineStats()
        self.submitted: list[Request] = []
        self.aborted: list[str] = []
        self.refusal: Exception | None = None  # raised by the next submits
        self.start_error: SlipstreamError | None = None
        self.health_now = Health(True, True)
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.flowing = asyncio.Event()  # cleared: no token is made until the test says so
        self.flowing.set()
        self.closed = False
        self.readout: Callable[[Request], Readout] = made_up
        self.token_logprob: Callable[[int], float] = lambda _: -0.5

    async def start(self, on_phase: Callable[[Phase], None]) -> None:
        on_phase(Phase("weights", 0.1, 1 << 20))
        await self.may_start.wait()
        if self.start_error is not None:
            raise self.start_error

    def health(self) -> Health:
        return self.health_now

    def cancel(self, wanted: Callable[[str], bool]) -> list[str]:
        cancelled = self.in_flight.cancel(wanted, 0.0)
        self.aborted.extend(cancelled)
        return cancelled

    def operator(self) -> FakeOperator:
        return self.asked

    def add_observer(self, observer: EngineObserver) -> None:
        self.observers.append(observer)

    async def submit(self, requests: Sequence[Request], *, param: str = "prompt") -> EventStream:
        if self.refusal is not None:
            raise self.refusal
        if self.closed:
            raise EngineDead("closed")
        fitted = [validate(request, self.info, param=param) for request in requests]
        for request in fitted:
            if request.id in self.in_flight:
                raise DuplicateRequest(f"a request with the id {request.id!r} is running", param="request_id")
        stream = EventStream((request.id for request in fitted), self._abort)
        self.submitted.extend(fitted)
        self.in_flight.add(fitted, self.tokenizer, stream)
        for request in fitted:
            task = asyncio.ensure_future(self._generate(request))
            task.add_done_callback(lambda done: done.cancelled() or done.result())
        return stream

    async def check_grammar(self, grammar: Grammar, param: str = "grammar") -> None:
        await self.grammars.admit(grammar, param)

    async def drain(self, timeout: float) -> None:
        self.refusal = Overloaded("the server is shutting down", "draining")
        try:
            await asyncio.wait_for(self.in_flight.idle.wait(), timeout)
        except TimeoutError:
            self.fail("the server is shutting down and this request had not finished")

    async def close(self) -> None:
        self.closed = True
        self.grammars.close()
        self.fail("the engine was closed")

    def fail(self, reason: str) -> None:
        """What a dead engine process does to everything in flight."""
        self.in_flight.fail_all(reason, FinishReason.ERROR, 0.0)

    def error(self, request_id: str, text: str = "NaN at /secret/path 0x7f") -> None:
        """What a failed step does to one request."""
        self.in_flight.take([SeqUpdate(request_id, finish=FinishReason.ERROR, error=text)], 0.0)

    def tokens_of(self, request: Request) -> list[int]:
        if callable(self.answer):
            return list(self.answer(request))
        if isinstance(self.answer, str):
            return [*self.tokenizer.encode(self.answer, add_special_tokens=False), EOS]
        return list(self.answer)

    def _abort(self, request_ids: Iterable[str]) -> None:
        self.aborted.extend(self.in_flight.drop(request_ids, 0.0))

    async def _denoise(self, request: Request) -> None:
        rest = self.tokens_of(request)[: request.sampling.max_tokens]
        for step in itertools.count(1):
            if not rest:
                return
            await asyncio.sleep(0)
            await self.flowing.wait()
            if request.id not in self.in_flight:
                return
            count = 3 if step % 2 == 0 else 0
            tokens, rest = rest[:count], rest[count:]
            update = SeqUpdate(
                request.id,
                tuple(tokens),
                logprobs=self._scores(tokens, request.sampling.alternatives),
                finish=None if rest else FinishReason.LENGTH,
                passes=Passes(step, step * 2, step // 4, step // 4, step * 8),
                canvas=_canvas_step(request, step, rest) if request.diffusion.trace and not count else None,
            )
            self.aborted.extend(self.in_flight.take([_stopped(update, request)], 0.0))

    async def _read(self, request: Request) -> None:
        await asyncio.sleep(0)
        await self.flowing.wait()
        if request.id in self.in_flight:
            update = SeqUpdate(request.id, finish=FinishReason.STOP, cached_tokens=2, reading=self.readout(request))
            self.aborted.extend(self.in_flight.take([update], 0.0))

    async def _generate(self, request: Request) -> None:
        if request.reading is not None:
            await self._read(request)
            return
        if self.info.diffusion is not None:
            await self._denoise(request)
            return
        rest, first = self.tokens_of(request)[: request.sampling.max_tokens], True
        for drafted, stood in self._rounds(request):
            if not rest:
                return
            await asyncio.sleep(0)
            await self.flowing.wait()
            if request.id not in self.in_flight:
                return
            tokens, rest = rest[: stood + 1], rest[stood + 1 :]
            update = SeqUpdate(
                request.id,
                tuple(tokens),
                logprobs=self._scores(tokens, request.sampling.alternatives),
                prompt_logprobs=self._scores(request.prompt_ids[1:], request.sampling.prompt_logprobs)
                if first
                else None,
                finish=None if rest else FinishReason.LENGTH,
                cached_tokens=2,
                drafted=drafted,
                accepted=stood,
                bias=_bias(drafted, stood)[: len(tokens)] if request.speculation.bias_bound else (),
            )
            first = False
            self.aborted.extend(self.in_flight.take([_stopped(update, request)], 0.0))

    def _rounds(self, request: Request) -> Iterator[tuple[int, int]]:
        """How many tokens each step drafts, and how many of them stand; none in the first step, which is prefill."""
        most = request.speculation.bound(self.info.max_draft)
        yield 0, 0
        for stood in itertools.cycle(self.stands or (0,)):
            yield most, min(stood, most)

    def _scores(self, tokens: Sequence[int], count: int | tuple[int, ...] | None) -> tuple[TokenLogprob, ...] | None:
        """Every token is the most likely one, with its successors in the vocabulary behind it."""
        if count is None:
            return None
        scores = []
        for token in tokens:
            ids = [(token + i) % VOCAB for i in range(count)] if isinstance(count, int) else count
            top = tuple((other, self.token_logprob(token) - i) for i, other in enumerate(ids))
            scores.append(TokenLogprob(token, self.token_logprob(token), 1, top))
        return tuple(scores)


def _canvas_step(request: Request, step: int, rest: Sequence[int]) -> CanvasStep:
    """The next three tokens are there, behind those of the steps before."""
    first = len(request.prompt_ids) + step // 2 * 3
    return CanvasStep(len(request.prompt_ids), first + 3, step, tuple(enumerate(rest[:3], start=first)))


def made_up(request: Request) -> Readout:
    """Of a reading: the prompt's length, its first and its last token, and which pooling; each label half as likely as
    the one before it."""
    reading, ids = request.reading, request.prompt_ids
    assert reading is not None
    pooled = struct.pack("<4f", len(ids), ids[0], ids[-1], 1.0 if reading.pooling == "mean" else -1.0)
    laws = (
        Law(tuple(-math.log(2) * (i + 1) for i in range(len(probe.token_ids))), probe.token_ids[0])
        for probe in reading.probes
    )
    return Readout(pooled if reading.pooling else b"", tuple(laws))


def _bias(drafted: int, stood: int) -> tuple[float, ...]:
    return (0.125,) * stood + (0.25 if stood < drafted else 0.0,)


def _stopped(update: SeqUpdate, request: Request) -> SeqUpdate:
    """The update as the scheduler would send it: ended, and cut, behind the first token that stops the request."""
    sampling = request.sampling
    for i, token in enumerate(update.token_ids):
        stopped = token in sampling.stop_token_ids
        if stopped or (token == EOS and not sampling.ignore_eos):
            scores = None if update.logprobs is None else update.logprobs[: i + 1]
            stop_id = token if stopped else None
            tokens = update.token_ids[: i + 1]
            return replace(
                update,
                token_ids=tokens,
                logprobs=scores,
                finish=FinishReason.STOP,
                stop_token_id=stop_id,
                bias=update.bias[: i + 1],
            )
    return update
