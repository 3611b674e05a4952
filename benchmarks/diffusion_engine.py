"""One masked-diffusion checkpoint served in this process, and the cases of a task run through it.

Rule, cache and all else of denoising are settings of each request, so all variants of a model take turns on one loaded
model. HTTP is left out for all alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from benchmarks.diffusion_confidence import watching
from benchmarks.diffusion_figures import Sample
from benchmarks.diffusion_samples import Answered, Kept, digest, key_of
from benchmarks.diffusion_variants import PLAIN, Variant
from benchmarks.drafts_engine import Answer, Conditions, Load, Restrained, Run, run
from benchmarks.drafts_options import say
from benchmarks.stream import BenchmarkError
from benchmarks.verifiers_task import Ending, Group, requests
from engine.config import DiffusionConfig, EngineConfig, KVConfig, ModelConfig, ParallelConfig, SchedulerConfig
from engine.core import EngineCore, model_info
from engine.diffusion import DiffusionInfo, DiffusionParams
from engine.errors import InvalidRequest, SlipstreamError
from engine.protocols import WorkerFactory
from engine.registry import WORKERS
from engine.registry import resolve as look_up
from engine.tokenizer.tokenizer import Tokenizer
from engine.types import ModelInfo, Phase, Request, SamplingParams
from engine.validate import validate

STEP = 2048  # tokens that one step may feed, as in configs/fast-dllm.yaml


@dataclass(frozen=True, slots=True)
class Asked:
    """The cases as prompts of one model, and how its answers are scored."""

    group: Group
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    tokens: int  # of an answer at most, which is the canvas of full-attention models

    def first(self, count: int) -> Asked:
        """The first so many cases."""
        return replace(self, group=replace(self.group, questions=self.group.questions[:count]))

    @property
    def ending(self) -> Ending:
        return Ending(self.tokenizer, self.group.stop)

    def requests(
        self,
        info: ModelInfo,
        params: DiffusionParams,
        label: str,
        places: Sequence[int] | None = None,
        *,
        logprobs: bool = False,
    ) -> list[Request]:
        """These cases, or all, settled as those of clients are; one may be there twice. Raises BenchmarkError."""
        sampling = SamplingParams(max_tokens=self.tokens, temperature=0.0, logprobs=0 if logprobs else None)
        chosen = range(len(self.group.questions)) if places is None else places
        group = replace(self.group, questions=tuple(self.group.questions[place] for place in chosen))
        try:
            return [
                validate(replace(one, id=f"{label}/{number}", eos_ids=self.eos_ids, diffusion=params), info)
                for number, one in enumerate(requests(group, self.tokenizer, sampling, 1, label))
            ]
        except InvalidRequest as error:
            raise BenchmarkError(f"{label}: {error.message}") from error

    def sample(self, number: int, answer: Answer) -> Sample:
        """What came of one case."""
        passes, score = answer.passes, self.group.questions[number].score
        sure = [math.exp(one.logprob) for one in answer.scored]
        return Sample(
            score=0.0 if score is None else score(self.ending.text(answer.tokens)),
            tokens=len(answer.tokens),
            forwards=passes.forwards,
            draft_forwards=passes.draft_forwards,
            positions=passes.positions - passes.draft_positions,
            draft_positions=passes.draft_positions,
            verifies=passes.verifies,
            remasked=passes.remasked,
            confidence=sum(sure) / len(sure) if sure else 0.0,
        )


class Served:
    """A loaded model. `phases` tells what was loaded."""

    def __init__(
        self,
        folder: Path,
        load: Load,
        pipeline: str = "masked_diffusion",
        drafter: Path | None = None,
        kept: Kept | None = None,
    ) -> None:
        """Raises BenchmarkError where it can't be loaded, or denoises nothing."""
        self.phases: list[Phase] = []
        self.kept = kept or Kept()
        self._key = (pipeline, load.quant, digest(folder), "" if drafter is None else digest(drafter))
        diffusion = DiffusionConfig(drafter="" if drafter is None else str(drafter))
        model = ModelConfig(path=str(folder), pipeline=pipeline, quant=load.quant, diffusion=diffusion)
        self._config = EngineConfig(
            model=model,
            scheduler=SchedulerConfig(max_batched_tokens=STEP),
            kv=KVConfig(memory=load.memory),
            parallel=ParallelConfig(threads=load.threads),
        )
        try:
            factory = cast(WorkerFactory, look_up(WORKERS, "local", "worker"))
            self.worker = factory(self._config, folder, self.phases.append)
            capacity = self.worker.capacity()
            assert capacity.diffusion is not None, "to load a model that denoises nothing is an error"
            self.tokenizer = Tokenizer.load(folder, mask_id=capacity.diffusion.mask_id)
            self.info = model_info(self._config, capacity, self.tokenizer.eos_ids, 0)
        except SlipstreamError as error:
            raise BenchmarkError(f"{folder.name}: {error}") from error

    @property
    def diffusion(self) -> DiffusionInfo:
        found = self.info.diffusion
        assert found is not None
        return found

    def asked(self, group: Group, tokens: int) -> Asked:
        """Cases for this model, with answers of so many tokens at most."""
        return Asked(group, self.tokenizer, self.info.eos_ids, tokens)

    def key(self, wanted: Iterable[Request]) -> str:
        """Of these requests at this model."""
        return key_of(*self._key, *((one.prompt_ids, one.sampling, one.diffusion, one.eos_ids) for one in wanted))

    def core(self, conditions: Conditions) -> EngineCore:
        """A new engine over the loaded model, with nothing cached."""
        scheduler = replace(self._config.scheduler, max_num_seqs=conditions.seqs)
        cache = replace(self._config.kv, prefix_cache=conditions.prefix_cache)
        return EngineCore(
            Restrained(self.worker, conditions.num_blocks), replace(self._config, scheduler=scheduler, kv=cache)
        )


def check(served: Served, asked: Asked, variants: Iterable[Variant]) -> None:
    """Before hours of others: can each of them be asked? Raises BenchmarkError."""
    for one in variants:
        asked.requests(served.info, one.params, one.name, [0])


def answers(served: Served, asked: Asked, variant: Variant, clients: int) -> Answered:
    """All cases, so many at once; nothing is timed. What is kept already is not asked again. Raises BenchmarkError."""
    wanted = asked.requests(served.info, variant.params, variant.name, logprobs=variant.name == PLAIN)
    key = served.key(wanted)
    told = served.kept.find(key)
    if told is None:
        core = served.core(Conditions(seqs=max(clients, 2), prefix_cache=True))
        with watching() as seen:
            found = run(core, wanted, clients, ended=asked.ending.reached).answers
        samples = [asked.sample(number, answer) for number, answer in enumerate(found)]
        told = Answered(key, samples, seen.histogram(variant.name))
        served.kept.add(told)
    right, forwards = (
        sum(values) for values in zip(*((s.score, s.forwards + s.draft_forwards) for s in told.samples), strict=True)
    )
    length = sum(one.tokens for one in told.samples) / max(forwards, 1)
    say(f"{variant.title:<28} {right / len(told.samples):.3f} right  {length:.2f} tokens per forward")
    return told


def timed(served: Served, asked: Asked, wanted: Sequence[Request], clients: int) -> Run:
    """Requests at so many a time; nothing is cached from others."""
    return run(served.core(Conditions(seqs=max(clients, 2))), wanted, clients, ended=asked.ending.reached)
