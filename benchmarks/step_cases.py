"""The steps that are measured, and how: one forward pass over the paged pool and one draw per scored row.

The runner is driven directly, with the sampler of the engine: what the pipelines do around it (a few dictionaries) and
the scheduler are left out, so nothing but the case decides what is in a step. Keys and values before a query are
random numbers in the pool; ids are new at every step, blocks are scattered.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.step_ceilings import Ceilings, synchronize
from benchmarks.step_parts import Parts, Split, Work, native_split
from engine.errors import ConfigError
from engine.kernels.native_step import NativeStep
from engine.runtime.batch import SeqInput
from engine.runtime.loading import LoadedModel
from engine.runtime.sampler import Sampler, SamplingState
from engine.types import Request, SamplingParams

MOST_STEPS = 200


@dataclass(frozen=True, slots=True)
class Case:
    """`batch` sequences with `kv` tokens each in the pool feed `query` more; a token is drawn for the last `scored`."""

    kind: str  # decode, verify or prefill
    batch: int
    query: int
    kv: int
    scored: int

    @property
    def name(self) -> str:
        query = f" query {self.query}" if not self.kind.endswith("decode") else ""
        return f"{self.kind} batch {self.batch}{query} kv {self.kv}"

    @property
    def tokens(self) -> int:
        return self.batch * self.query


def grid(batches: Sequence[int], kvs: Sequence[int], queries: Sequence[int], prefills: Sequence[int]) -> list[Case]:
    """Decodes (query 1) and verify blocks over every batch and length, then prompts of one sequence."""
    cases = [
        Case("decode" if query == 1 else "verify", batch, query, kv, query)
        for query in queries
        for kv in kvs
        for batch in batches
    ]
    return cases + [Case("prefill", 1, tokens, 0, 1) for tokens in prefills]


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure a case: at least `least` steps, then until `seconds` are over; and `split` steps by part.

    `ceilings` is how often each of the machine's limits is tried.
    """

    warm_up: int
    least: int
    seconds: float
    split: int
    ceilings: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured of one case: `ms` of whole steps; by part, in steps of their own; and the work of a step."""

    case: Case
    ms: float  # median
    lowest_ms: float
    highest_ms: float
    steps: int
    parts_ms: dict[str, float]
    work: Work

    @property
    def shares(self) -> dict[str, float]:
        """Of a step's time, by part; they add up to 1."""
        total = sum(self.parts_ms.values())
        return {name: value / total for name, value in self.parts_ms.items()}

    def floors_ms(self, ceilings: Ceilings) -> dict[str, float]:
        """The least time of a part on a machine with these ceilings: its bytes or its operations, whichever is more."""
        work, read, compute = self.work, ceilings.bytes_per_second, ceilings.flops_per_second
        return {
            "gemm": 1e3 * max(work.gemm_bytes / read, work.gemm_flops / compute),
            "attention": 1e3 * max(work.attention_bytes / read, work.attention_flops / compute),
        }


class Bench:
    """A model over a pool that holds the largest of `cases`."""

    def __init__(self, loaded: LoadedModel, block_size: int, cases: Sequence[Case], sampling: SamplingParams) -> None:
        for case in cases:
            if case.kv + case.query > loaded.context_length:
                raise ConfigError(f"{case.name}: the model's context is {loaded.context_length} tokens")
        needed = [case.batch * -(-(case.kv + case.query) // block_size) for case in cases]
        self._runner = loaded.runner(max(needed), block_size)
        for layer in self._runner.cache.layers:
            layer.joint.normal_()
        self._blocks = list(range(max(needed)))
        random.Random(0).shuffle(self._blocks)
        self._block_size = block_size
        self._sampling = sampling
        self._random = random.Random(1)
        self.device = loaded.placement.device
        self.threads = torch.get_num_threads()

    def measure(self, case: Case, effort: Effort) -> Figures:
        states = self._states(case)
        sampler = Sampler(self._runner.vocab_size)
        seconds: list[float] = []
        began = time.monotonic()
        for turn in range(MOST_STEPS + effort.warm_up):
            inputs = self._inputs(case)
            synchronize(self.device)
            start = time.perf_counter()
            self._step(case, inputs, sampler, states, None)
            if turn >= effort.warm_up:
                seconds.append(time.perf_counter() - start)
            else:
                began = time.monotonic()
            if len(seconds) >= effort.least and time.monotonic() - began > effort.seconds:
                break
        splits = self._split(case, effort, sampler, states, statistics.median(seconds))
        return _figures(case, seconds, splits, self.device.type == "cuda")

    def _split(
        self, case: Case, effort: Effort, sampler: Sampler, states: list[SamplingState], expected: float
    ) -> list[Split]:
        program = self._runner.adapter.program
        if program is not None:
            return self._native_split(program.step, case, effort, sampler, states)
        with Parts(self._runner, self.device) as parts:
            splits = []
            for _ in range(1 + effort.split):
                inputs = self._inputs(case)
                splits.append(
                    parts.step(
                        lambda inputs=inputs: self._step(case, inputs, sampler, states, parts),  # type: ignore[misc]
                        expected,
                    )
                )
        return splits[1:]

    def _native_split(
        self, step: NativeStep, case: Case, effort: Effort, sampler: Sampler, states: list[SamplingState]
    ) -> list[Split]:
        """By the program's own clock, which costs next to nothing; what was done is counted in a pass of modules."""
        with Parts(self._runner, self.device) as parts:  # hooks turn the program off
            inputs = self._inputs(case)
            work = parts.step(lambda: self._step(case, inputs, sampler, states, parts), 0.0).work
        watch, splits = Parts(self._runner, self.device), []
        for _ in range(1 + effort.split):
            inputs = self._inputs(case)
            step.reset_profile()
            split = watch.step(
                lambda inputs=inputs: self._step(case, inputs, sampler, states, watch),  # type: ignore[misc]
                0.0,
            )
            splits.append(native_split(split, step.profile(), work))
        return splits[1:]

    @torch.inference_mode()
    def _step(
        self, case: Case, inputs: list[SeqInput], sampler: Sampler, states: list[SamplingState], parts: Parts | None
    ) -> None:
        ends = range(case.query, case.tokens + 1, case.query)
        logits = self._runner.forward(inputs, [row for end in ends for row in range(end - case.scored, end)])
        if parts is None:
            sampler.sample(logits, states).tokens.tolist()
            return
        with parts.span("sampling"):
            tokens = sampler.sample(logits, states).tokens
            if self.device.type != "cuda":
                tokens.tolist()

    def _inputs(self, case: Case) -> list[SeqInput]:
        size = -(-(case.kv + case.query) // self._block_size)
        vocab_size = self._runner.vocab_size
        return [
            SeqInput(
                self._random.choices(range(vocab_size), k=case.query),
                case.kv,
                self._blocks[i * size : (i + 1) * size],
                case.kv + case.query,
            )
            for i in range(case.batch)
        ]

    def _states(self, case: Case) -> list[SamplingState]:
        count = case.batch * case.scored
        return [SamplingState(Request(f"{row}", (0,), self._sampling)) for row in range(count)]


def _figures(case: Case, seconds: list[float], splits: list[Split], cuda: bool) -> Figures:
    median = statistics.median(seconds)
    parts = {name: statistics.median(split.parts.get(name, 0.0) for split in splits) for name in splits[-1].parts}
    if cuda:  # what the device's own work does not explain
        parts["host"] = max(median - statistics.median(split.device for split in splits), 0.0)
    return Figures(
        case=case,
        ms=1e3 * median,
        lowest_ms=1e3 * min(seconds),
        highest_ms=1e3 * max(seconds),
        steps=len(seconds),
        parts_ms={name: 1e3 * value for name, value in parts.items()},
        work=splits[-1].work,
    )
