"""LLM: the same engine for offline use from Python, in this process and without a server."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import cast, get_type_hints

from engine.config import EngineConfig
from engine.config_values import build
from engine.core import EngineCore, model_info
from engine.diffusion import DiffusionParams, DiffusionReport
from engine.errors import ConfigError, StepFailed
from engine.front.output import RequestOutput, merge
from engine.hub.diffusion import find_spec
from engine.hub.drafts import settle_draft
from engine.hub.resolve import resolve
from engine.protocols import WorkerFactory
from engine.registry import WORKERS
from engine.registry import resolve as resolve_name
from engine.structured.check import GrammarCheck
from engine.structured.wire import Words
from engine.tokenizer.tokenizer import Tokenizer
from engine.types import (
    Capacity,
    FinishReason,
    ModelInfo,
    Phase,
    Request,
    SamplingParams,
    SpeculationParams,
    SpeculationReport,
    StepReport,
    TokenEvent,
    TokenLogprob,
    Usage,
)
from engine.validate import validate

logger = logging.getLogger(__name__)

CACHE_DIR = Path("~/.cache/slipstream")
DEFAULTS = SamplingParams(max_tokens=256)


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer. `token_ids` are those that count: what followed a stop string is not among them."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish: FinishReason
    stop_reason: int | str | None
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    speculation: SpeculationReport | None = None  # where it was asked for
    diffusion: DiffusionReport | None = None  # likewise


@dataclass(frozen=True, slots=True)
class _Wish:
    """How all requests of one call are to be decoded."""

    speculation: SpeculationParams = field(default_factory=SpeculationParams)
    diffusion: DiffusionParams = field(default_factory=DiffusionParams)

    def sampling(self) -> SamplingParams:
        """Of a call that gives none."""
        canvas: object = self.diffusion.canvas  # of a caller who may not have read the type
        return replace(DEFAULTS, max_tokens=canvas) if isinstance(canvas, int) and canvas > 0 else DEFAULTS


class LLM:
    """A model in this process. Use it as a context manager, or call `close`.

    `overrides` are keys of the configuration's model, scheduler, kv and parallel sections, for example
    `LLM("demo", quant="none", max_num_seqs=8, memory="256MiB")`. Raises ConfigError and ModelLoadError.
    """

    def __init__(
        self,
        path: str = "demo",
        *,
        config: EngineConfig | None = None,
        cache_dir: Path | None = None,
        worker: str = WORKERS["local"],
        **overrides: object,
    ) -> None:
        if config is not None and overrides:
            raise ConfigError("give LLM a config or single settings, not both")
        cache = (cache_dir or CACHE_DIR).expanduser()
        config = replace(config or configure({"path": path, **overrides}), cache_dir=str(cache))
        config = settle_draft(config, cache, logger.info)
        folder = resolve(config.model.path, cache, logger.info)
        spec = find_spec(folder, config.model.diffusion)
        self.tokenizer = Tokenizer.load(folder, mask_id=None if spec is None else spec.mask_id)
        loaded = cast(WorkerFactory, resolve_name({worker: worker}, worker, "worker"))(config, folder, _log_phase)
        self._core = EngineCore(loaded, config)
        self._ids = itertools.count()
        self.info = _info(config, loaded.capacity(), self.tokenizer)
        self._grammars = GrammarCheck(lambda: Words.of(self.tokenizer, self.info.vocab_size, self.info.eos_ids))

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        speculation: SpeculationParams | None = None,
        diffusion: DiffusionParams | None = None,
    ) -> list[Completion]:
        """Complete texts, or prompts that are token ids already; the answers are in the order of the prompts.

        One `params` is used for all prompts, or there is one for each. The default is up to 256 tokens at
        temperature 1 with seed 0: equal prompts give equal answers until they get seeds of their own. `speculation`
        counts where the model has a drafter; `diffusion` is for models that denoise, and its canvas, where there is
        one, takes the place of the 256.
        Raises InvalidRequest before anything is generated, and StepFailed if a request fails inside the engine.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        encoded = [self.tokenizer.encode(p) if isinstance(p, str) else p for p in texts]
        wish = _Wish(speculation or SpeculationParams(), diffusion or DiffusionParams())
        return self._run(encoded, params or wish.sampling(), "prompt", wish)

    def chat(self, messages: Sequence[Mapping[str, object]], params: SamplingParams | None = None) -> Completion:
        """The next answer of a conversation, through the model's own chat template."""
        return self._run([self.tokenizer.encode_chat(messages)], params or DEFAULTS, "messages", _Wish())[0]

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        name: str,
        wish: _Wish,
    ) -> list[Completion]:
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(each)} sets of parameters")
        requests = [self._request(ids, sampling, wish, name) for ids, sampling in zip(prompts, each, strict=True)]
        for request in requests:
            if request.sampling.grammar is not None:
                self._grammars.ensure(request.sampling.grammar)  # elsewhere: what is too much for it can't harm us
                self._core.prepare(request)
        outputs = {request.id: RequestOutput(request, self.tokenizer) for request in requests}
        events: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
        for request in requests:
            self._core.add(request)
        try:
            while self._core.has_work():
                self._take(self._core.step(), outputs, events)
        except BaseException:  # Ctrl-C too: the next call must start with an empty engine
            self._core.abort(outputs)
            raise
        self._core.settle()
        return [_completion(request, merge(events[request.id])) for request in requests]

    def _request(self, ids: Sequence[int], sampling: SamplingParams, wish: _Wish, name: str) -> Request:
        eos_ids = () if sampling.ignore_eos else self.info.eos_ids
        request_id = f"offline-{next(self._ids)}"
        request = Request(request_id, tuple(ids), sampling, eos_ids, arrival=time.monotonic())
        request = replace(request, speculation=wish.speculation, diffusion=wish.diffusion)
        return validate(request, self.info, param=name)

    def _take(self, report: StepReport, outputs: dict[str, RequestOutput], events: dict[str, list[TokenEvent]]) -> None:
        for update in report.updates:
            output = outputs.get(update.request_id)
            if output is None:  # over by a stop string, or left from a call that was broken off
                continue
            if update.finish is FinishReason.ERROR:
                raise StepFailed(update.error or "the request failed inside the engine")
            event = output.take(update, time.monotonic())
            if event is None:
                continue
            events[update.request_id].append(event)
            if event.finish is not None:
                del outputs[update.request_id]
                if update.finish is None:
                    self._core.abort((update.request_id,))

    def close(self) -> None:
        self._grammars.close()
        self._core.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def configure(settings: Mapping[str, object]) -> EngineConfig:
    """An engine configuration from keys of all its sections, which have no name in common. Raises ConfigError."""
    hints = get_type_hints(EngineConfig)
    sections = {name: {f.name for f in fields(kind)} for name, kind in hints.items() if is_dataclass(kind)}
    data: dict[str, dict[str, object]] = {}
    for key, value in settings.items():
        section = next((name for name, keys in sections.items() if key in keys), None)
        if section is None:
            raise ConfigError(f"{key}: unknown setting; known: {', '.join(sorted(set().union(*sections.values())))}")
        data.setdefault(section, {})[key] = value
    return build(EngineConfig, data, "")


def _info(config: EngineConfig, capacity: Capacity, tokenizer: Tokenizer) -> ModelInfo:
    return model_info(config, capacity, tokenizer.eos_ids, int(time.time()), tokenizer.thinking_form)


def _completion(request: Request, event: TokenEvent) -> Completion:
    assert event.finish is not None
    return Completion(
        prompt_ids=request.prompt_ids,
        token_ids=event.token_ids,
        text=event.text,
        finish=event.finish,
        stop_reason=event.stop_reason,
        usage=event.usage,
        logprobs=event.logprobs,
        prompt_logprobs=event.prompt_logprobs,
        speculation=event.speculation,
        diffusion=event.diffusion,
    )


def _log_phase(phase: Phase) -> None:
    logger.info("%s: %.1f s, %.0f MiB %s", phase.name, phase.seconds, phase.memory / 2**20, phase.detail)
