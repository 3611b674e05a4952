"""A tiny random network served as any masked-diffusion model, step by step, and what every step left of each request.

The weights are those of a small Llama, which say nothing of how they are to be attended with: a `DiffusionSpec` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.attention.sdpa import SdpaAttention
from engine.config import EngineConfig, KVConfig, SchedulerConfig
from engine.core import EngineCore
from engine.diffusion import DiffusionParams, DiffusionSpec
from engine.models.adapter import DecoderAdapter
from engine.pipelines.masked_diffusion import MaskedDiffusionPipeline
from engine.protocols import UnmaskRule
from engine.registry import RULES, resolve
from engine.runtime.kv_cache import PagedKVCache
from engine.runtime.runner import ModelRunner
from engine.types import Capacity, FinishReason, Passes, Request, SamplingParams, StepOutput, StepPlan, TokenLogprob

VOCAB, MASK = 48, 47
PAGE = 8
JUNK = 50.0  # what the pool holds where nothing was written: reading it would show

State = dict[int, int]  # committed tokens by position


def network(seed: int = 0) -> LlamaForCausalLM:
    """Two layers, with confidences from nearly 0 to nearly 1."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.9 if "lm_head" in name else 0.3)
    return model.eval()


def all_rules() -> dict[str, UnmaskRule]:
    return {name: cast(Callable[[], UnmaskRule], resolve(RULES, name, "rule"))() for name in RULES}


def request(
    name: str,
    prompt: Sequence[int],
    max_tokens: int,
    params: DiffusionParams,
    eos_ids: tuple[int, ...] = (),
    choice: int = 0,
    **sampling: object,
) -> Request:
    """Greedy where nothing else is said."""
    sampling = {"temperature": 0.0, **sampling}
    return Request(
        name,
        tuple(prompt),
        SamplingParams(max_tokens, **sampling),  # type: ignore[arg-type]
        eos_ids=eos_ids,
        choice=choice,
        diffusion=params,
    )


@dataclass(slots=True)
class Outcome:
    """`states`: what was committed after each step that changed anything; `passes`: of all its steps."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    passes: Passes = field(default_factory=Passes)
    finish: FinishReason | None = None
    error: str | None = None
    cached_tokens: int = 0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    output: StepOutput

    def result(self) -> StepOutput:
        return self.output


class Rig:
    """A real core over the network, with one pool for all its runs."""

    def __init__(
        self,
        spec: DiffusionSpec,
        model: LlamaForCausalLM,
        *,
        num_blocks: int = 96,
        chunk: int = 512,
        seqs: int = 16,
        rules: Mapping[str, UnmaskRule] | None = None,
        prefix_cache: bool = False,
    ) -> None:
        adapter = DecoderAdapter(model)
        cache = PagedKVCache(adapter.probe(), num_blocks, PAGE, torch.float32, torch.device("cpu"))
        for layer in cache.layers:
            layer.joint.fill_(JUNK)
        self.spec = spec
        self.runner = ModelRunner(adapter, cache, SdpaAttention())
        self.pipeline = MaskedDiffusionPipeline(self.runner, spec, rules or all_rules())
        self.fed: list[int] = []  # positions of each step
        self._blocks, self._budget = num_blocks, chunk
        scheduler = SchedulerConfig(max_num_seqs=seqs, max_batched_tokens=chunk)
        config = EngineConfig(scheduler=scheduler, kv=KVConfig(block_size=PAGE, prefix_cache=prefix_cache))
        self.core = EngineCore(self, config, hash_seed=b"the same denoise.")
        self._outcomes: dict[str, Outcome] = {}

    def capacity(self) -> Capacity:
        return Capacity(
            num_blocks=self._blocks,
            block_size=PAGE,
            max_model_len=256,
            vocab_size=VOCAB,
            traits=self.pipeline.traits,
            diffusion=self.spec,
            max_canvas=0 if self.spec.block_causal else self._budget,
        )

    def prepare(self, request: Request) -> None:
        """Nothing that takes time."""

    def submit(self, plan: StepPlan) -> Done:
        output = self.pipeline.execute(plan)
        for result in output.results:
            canvas = self.pipeline._table[result.request_id]
            outcome = self._outcomes[result.request_id]
            after = {
                at: token for at, token in enumerate(canvas.ids) if token != MASK and at >= canvas.sampling.position
            }
            if after and after != (outcome.states or [{}])[-1]:
                outcome.states.append(after)
            outcome.passes = outcome.passes.plus(result.passes or Passes())
        self.fed.append(sum(result.passes.positions for result in output.results if result.passes is not None))
        return Done(output)

    def num_states(self) -> int:
        return self.pipeline.num_states()

    def close(self) -> None: ...

    def run(self, requests: Sequence[Request], on_step: Callable[[int], None] = lambda _: None) -> dict[str, Outcome]:
        """Until all have ended; blocks and states are all given back."""
        self._outcomes = {one.id: Outcome() for one in requests}
        for one in requests:
            self.core.add(one)
        step = 0
        while self.core.has_work():
            report = self.core.step()
            self.core.check_integrity()
            for update in report.updates:
                outcome = self._outcomes[update.request_id]
                assert outcome.finish is None, "an update after the last one"
                assert MASK not in update.token_ids
                outcome.tokens.extend(update.token_ids)
                outcome.logprobs.extend(update.logprobs or ())
                outcome.finish, outcome.error = update.finish, update.error
                outcome.cached_tokens, outcome.preemptions = update.cached_tokens, update.preemptions
            step += 1
            assert step < 2000
            on_step(step)
        self.core.settle()
        assert self.num_states() == 0 and self.core.stats().kv_blocks_used == 0
        return self._outcomes
