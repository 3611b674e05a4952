"""The engine's block-diffusion drafts against DFlash in plain loops: drafts, accepted lengths and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import DraftConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.drafters.dflash import DFlashDrafter
from engine.models.dflash.model import DFlashModel, assemble
from engine.models.dflash.spec import DFlashSpec, DraftLayer
from engine.protocols import DraftAsk, DraftProposal, DraftSampler
from engine.runtime.assembly import build_pipeline
from engine.runtime.drafts import bind_draft, draft_host
from engine.runtime.loading import LoadedModel, load_checked
from engine.runtime.worker import DoneHandle
from engine.types import Capacity, Request, SpeculationParams, StepPlan
from tests.contract.ladder import Ladder, request
from tests.numeric.dflash_reference import Reference
from tests.tiny import save_tiny, tiny_config, tiny_model
from tests.tiny_drafts import tiny_spec, tiny_tensors

PUSH = 1000.0  # added to a logit, it decides
BLOCKS = 64
Seen = dict[str, list[tuple[int, torch.Tensor]]]  # request -> position of each anchor, and its draft's logits
TOLERANCE = 2e-4  # of logits up to about 10: fp32 against float64


@dataclass
class Oracle:
    """Pushes the draft's logits towards what the target will say, at most places; and notes what was drafted."""

    model: DFlashModel
    answers: dict[str, list[int]] | None = field(default_factory=dict)  # request -> prompt and answer; None: no push
    seen: Seen = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def blocks(self, anchors: Sequence[int], asks: Sequence[DraftAsk]) -> tuple[torch.Tensor, torch.Tensor]:
        logits, hidden = self.model.blocks(anchors, asks)
        for ask, anchor, rows in zip(asks, anchors, logits, strict=True):
            self.seen.setdefault(ask.request_id, []).append((ask.position, rows[: ask.limit].clone()))
            if self.answers is None:
                continue
            answer = self.answers[ask.request_id]
            assert answer[ask.position] == anchor
            for step in range(len(rows)):
                rows[step] += push(answer, ask.position + 1 + step, self.model._ids, rows.shape[1])
        return logits, hidden


class Listener(DFlashDrafter):
    """Notes tokens and margins of each draft, by request and position of the anchor."""

    said: dict[tuple[str, int], tuple[list[int], list[float]]]

    def propose(self, asks: Sequence[DraftAsk], sampler: DraftSampler | None = None, width: int = 0) -> DraftProposal:
        proposal = super().propose(asks, sampler, width)
        for row, (ask, length) in enumerate(zip(asks, proposal.lengths, strict=True)):
            if length:
                assert proposal.margins is not None
                margins = proposal.margins[row, :length].tolist()
                self.said[ask.request_id, ask.position] = (proposal.tokens[row, :length].tolist(), margins)
        return proposal


def push(answer: list[int], position: int, ids: torch.Tensor | None, size: int) -> torch.Tensor:
    """What is added to the draft's logits [size] at a position; nothing at some places."""
    bias = torch.zeros(size)
    if position < len(answer) and (position * 2654435761 >> 9) % 7:
        known = torch.arange(size) if ids is None else ids
        bias[known == answer[position]] = PUSH
    return bias


class DraftedWorker:
    """A worker over a tiny target and a draft that an oracle helps. See `protocols.Worker`."""

    def __init__(self, loaded: LoadedModel, spec: DFlashSpec, tensors: dict[str, torch.Tensor]) -> None:
        model = ModelConfig(quant="none", pipeline="speculative", draft=DraftConfig("dflash", path="-"))
        config = EngineConfig(model=model, scheduler=SchedulerConfig(max_num_seqs=16))
        runner = loaded.runner(BLOCKS, config.kv.block_size)
        bound = bind_draft(assemble(spec, tensors, draft_host(loaded)), config, BLOCKS)
        assert isinstance(bound, DFlashModel)
        runner.follow(bound)
        self.oracle = Oracle(bound)
        self.drafter = Listener(self.oracle)
        self.drafter.said = {}
        self._pipeline = build_pipeline(model, runner, None, self.drafter)
        traits = self._pipeline.traits
        self._capacity = Capacity(BLOCKS, config.kv.block_size, loaded.context_length, runner.vocab_size, traits)

    def capacity(self) -> Capacity:
        return self._capacity

    def prepare(self, request: Request) -> None:
        """Nothing that takes time."""

    def submit(self, plan: StepPlan) -> DoneHandle:
        return DoneHandle(self._pipeline.execute(plan))

    def num_states(self) -> int:
        return self._pipeline.num_states()

    def close(self) -> None:
        """Nothing to release."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
    @cache
    def loaded(family: str) -> LoadedModel:
        folder: Path = save_tiny(family, tmp_path_factory.mktemp(family))
        return load_checked(ModelConfig(str(folder), quant="none", device="cpu"), folder, lambda _: None)

    return loaded


SLIDING = (DraftLayer(7, causal=True), DraftLayer())
CASES: dict[str, dict[str, Any]] = {
    "full attention": {},
    "sliding and causal, then full": {"layers": SLIDING},
    "sliding, then causal": {"layers": (DraftLayer(4), DraftLayer(causal=True)), "attention_bias": True},
    "one layer, one tap, long block": {"layers": (DraftLayer(),), "taps": (1,), "block_size": 19},
    "embedding as a tap": {"taps": (-1, 0, 2)},
    "anchor predicts": {"anchor_predicts": True, "own_embedding": True, "own_head": True},
    "dspark": {
        "anchor_predicts": True,
        "markov_rank": 8,
        "confidence_head": True,
        "confidence_with_markov": True,
        "own_embedding": True,
        "own_head": True,
    },
    "dflash2": {"conv_kernel": 3, "selector_rank": 8, "selector_top_k": 5, "layers": (DraftLayer(6), DraftLayer(9))},
    "small vocabulary": {"draft_vocab_size": 230},
    "small vocabulary, own head": {"draft_vocab_size": 220, "own_head": True, "markov_rank": 4},
    "scaled": {"embedding_scale": 3.0, "logit_scale": 0.5, "logit_softcap": 4.0},
}
PROMPTS = [[(i * 37 + 11) % 256 for i in range(25)], [200], [5, 9] * 8]
FAMILIES = ("llama", "qwen3")


def requests_for(count: int = 26, **options: Any) -> list[Request]:
    return [request(f"r{i}", prompt, count, temperature=0.0, **options) for i, prompt in enumerate(PROMPTS)]


def plain_answers(family: str, requests: Sequence[Request]) -> dict[str, list[int]]:
    """Prompt and greedy answer of each request."""
    model = tiny_model(family).double()
    answers = {}
    for one in requests:
        tokens = list(one.prompt_ids)
        while len(tokens) < len(one.prompt_ids) + one.sampling.max_tokens:
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        answers[one.id] = tokens
    return answers


@pytest.mark.parametrize(("case", "family"), [(case, FAMILIES[i % 2]) for i, case in enumerate(CASES)])
def test_engine_equals_plain_loops(target: Callable[[str], LoadedModel], case: str, family: str) -> None:
    spec = tiny_spec(tiny_config(family), **CASES[case])
    tensors = tiny_tensors(spec)
    requests = requests_for()
    worker = DraftedWorker(target(family), spec, tensors)
    worker.oracle.answers = answers = plain_answers(family, requests)
    outcomes = Ladder(worker).run(requests)
    lengths = []
    reference = Reference(spec, tensors, tiny_model(family).double())
    ids = tensors.get("d2t")
    for one in requests:
        answer = answers[one.id]
        bias = lambda position, size, answer=answer: push(answer, position, ids, size)  # noqa: E731
        tokens = reference.generate(list(one.prompt_ids), one.sampling.max_tokens, bias)
        assert outcomes[one.id].tokens == tokens == answer[len(one.prompt_ids) :]
        seen = worker.oracle.seen[one.id]
        assert [position for position, _ in seen] == [round_.position for round_ in reference.rounds]
        for (_, logits), round_ in zip(seen, reference.rounds, strict=True):
            expected = round_.logits[: len(logits)].float()
            torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)
            drafts, margins = worker.drafter.said[one.id, round_.position]
            assert drafts == round_.drafts
            if round_.confidences is not None:
                sure = round_.confidences[: len(margins)].tolist()
                assert margins == pytest.approx(sure, abs=TOLERANCE)
        lengths += [round_.accepted for round_ in reference.rounds]
    assert max(lengths) >= 4 and 0 in lengths, f"accepted {lengths}: too even to tell anything"


MORE: dict[str, dict[str, Any]] = {
    "chunked prefill": {"chunk": 7},
    "room for one token": {"chunk": 64, "most": 1},
    "three at a time": {"seqs": 3},
    "preempted": {"num_blocks": 7, "prefix_cache": False},
    "preempted, lag 1, chunked": {"num_blocks": 7, "lag": 1, "chunk": 11},
}


@pytest.fixture(scope="module")
def drafted(target: Callable[[str], LoadedModel]) -> DraftedWorker:
    """Drafts whose logits nobody pushes: random ones, hardly ever accepted."""
    spec = tiny_spec(tiny_config("llama"), layers=(DraftLayer(9), DraftLayer()))
    return DraftedWorker(target("llama"), spec, tiny_tensors(spec))


def drafts_of(worker: DraftedWorker, requests: Sequence[Request], ladder: Ladder | None = None) -> tuple[Seen, Ladder]:
    """The logits of every draft, by request and position of the anchor."""
    worker.oracle.seen = {}
    worker.oracle.answers = None
    ladder = ladder or Ladder(worker)
    outcomes = ladder.run(requests)
    assert all(len(outcomes[one.id].tokens) == one.sampling.max_tokens for one in requests)
    return worker.oracle.seen, ladder


def assert_same_drafts(expected: Seen, got: Seen) -> None:
    """Every draft in `got` is that of the same anchor in `expected`; few anchors stand elsewhere by a lucky draft."""
    known = {(name, position): logits for name, drafts in expected.items() for position, logits in drafts}
    places = [(name, position, logits) for name, drafts in got.items() for position, logits in drafts]
    compared = 0
    for name, position, logits in places:
        if (name, position) in known:
            rows = min(len(logits), len(known[name, position]))
            cold = known[name, position][:rows]
            torch.testing.assert_close(logits[:rows], cold, atol=TOLERANCE, rtol=TOLERANCE)
            compared += 1
    assert compared > 0.9 * len(places) > 10


def crowd() -> list[Request]:
    prompts = [*PROMPTS, [(i * 53) % 250 for i in range(33)], [7] * 30]
    return [request(f"r{i}", prompt, 24, temperature=0.0) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("name", MORE)
def test_drafts_do_not_depend_on_how_a_request_came_so_far(drafted: DraftedWorker, name: str) -> None:
    requests, options = crowd(), dict(MORE[name])
    alone: Seen = {}
    for one in requests:
        alone |= drafts_of(drafted, [one])[0]
    if most := options.pop("most", 0):  # the rest of each block lies in scratch, where it has no blocks of its own
        requests = [replace(one, speculation=SpeculationParams(max_draft=most)) for one in requests]
    got, ladder = drafts_of(drafted, requests, Ladder(drafted, **options))
    assert sum(map(len, got.values())) > 20
    assert ("preempted" in name) == (ladder.stats.preemptions > 0)
    assert_same_drafts(alone, got)


def test_drafts_over_a_cached_prefix_are_the_cold_ones(drafted: DraftedWorker) -> None:
    """A does not speculate, and leaves blocks behind; B finds them, with the draft's entries in them."""
    off = SpeculationParams(enabled=False)
    long = [(i * 41 + 3) % 256 for i in range(70)]
    a = request("a", long, 40, speculation=off, temperature=0.0)
    ladder = Ladder(drafted)
    none, _ = drafts_of(drafted, [a], ladder)
    assert none == {}
    answer = Ladder(drafted).run([a])["a"].tokens
    b = request("b", [*long, *answer, 5], 24, temperature=0.0)
    cold, _ = drafts_of(drafted, [b])
    hits = Ladder(drafted)
    hits.run([a])
    drafted.oracle.seen = {}
    outcomes = hits.run([b])
    assert outcomes["b"].cached_tokens >= 96
    assert_same_drafts(cold, drafted.oracle.seen)
    assert [position for position, _ in drafted.oracle.seen["b"]] == [position for position, _ in cold["b"]]


def test_choices_of_one_prompt_draft_as_if_alone(drafted: DraftedWorker) -> None:
    prompt = [(i * 29) % 256 for i in range(40)]
    requests = [
        replace(request(f"c{choice}", prompt, 20, choice, temperature=0.9, seed=4), group="c") for choice in range(3)
    ]
    alone: Seen = {}
    for one in requests:
        alone |= drafts_of(drafted, [one])[0]
    got, _ = drafts_of(drafted, requests)
    assert {name: [at for at, _ in drafts] for name, drafts in got.items()} == {
        name: [at for at, _ in drafts] for name, drafts in alone.items()
    }
    assert_same_drafts(alone, got)
