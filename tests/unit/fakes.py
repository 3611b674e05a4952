"""Fake devices over a fake KV memory that checks every read, and a driver that runs a scheduler on them.

The KV of a position is a digest of all tokens up to it, as real KV is a function of them; so KV that is stale,
misplaced or another request's is never taken for the right one.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from dataclasses import dataclass, field, replace

from engine.config import SchedulerConfig
from engine.scheduling.scheduler import Scheduler
from engine.types import (
    Admission,
    Capacity,
    DecodeTraits,
    FinishReason,
    Request,
    SamplingParams,
    ScheduledSeq,
    SeqResult,
    SeqUpdate,
    StepOutput,
    StepPlan,
)

VOCAB = 50_021
JUNK = -7  # stands for a drafted token that was rejected
SEED = b"0123456789abcdef"


def make_request(request_id: str, prompt: tuple[int, ...] | int = 4, max_tokens: int = 4, **fields: object) -> Request:
    """A request; `prompt` may be a length. Fields of Request and of SamplingParams may be given by name."""
    ids = tuple(range(100, 100 + prompt)) if isinstance(prompt, int) else prompt
    outer = {name: fields.pop(name) for name in list(fields) if name in Request.__dataclass_fields__}
    return Request(request_id, ids, SamplingParams(max_tokens=max_tokens, **fields), **outer)  # type: ignore[arg-type]


def make_scheduler(
    traits: DecodeTraits | None = None,
    *,
    blocks: int = 16,
    model_len: int | None = None,
    prefix_cache: bool = True,
    seqs: int = 8,
    budget: int = 64,
    costs: tuple[tuple[int, float], ...] = (),
    draft_costs: tuple[tuple[int, float], ...] = (),
) -> Scheduler:
    """A scheduler over blocks of four tokens, with a clock that stands at 5 s."""
    capacity = Capacity(blocks, 4, model_len or blocks * 4, VOCAB, traits or DecodeTraits(), costs, "", draft_costs)
    config = SchedulerConfig(max_num_seqs=seqs, max_batched_tokens=budget)
    return Scheduler(capacity, config, prefix_cache=prefix_cache, hash_seed=SEED, clock=lambda: 5.0)


def truth(request: Request, position: int) -> int:
    """The token that the fake model puts at a position of a request, whatever pipeline computes it."""
    return (request.sampling.seed * 7919 + position * 104_729) % VOCAB


def expected(request: Request, limit: int) -> tuple[list[int], FinishReason]:
    """What a request must get from a model whose sequences end at `limit` tokens."""
    tokens: list[int] = []
    stops = {*request.eos_ids, *request.sampling.stop_token_ids}
    while len(tokens) < request.sampling.max_tokens and len(request.prompt_ids) + len(tokens) < limit:
        tokens.append(truth(request, len(request.prompt_ids) + len(tokens)))
        if tokens[-1] in stops and len(tokens) > request.sampling.min_tokens:
            return tokens, FinishReason.STOP
    return tokens, FinishReason.LENGTH


@dataclass
class State:
    """Device state of one request; may be a step ahead of what the scheduler knows."""

    request: Request
    tokens: list[int]
    num_computed: int = 0
    digests: list[int] = field(default_factory=list)  # of tokens[: i + 1]

    def digest(self, position: int) -> int:
        while len(self.digests) <= position:
            before = self.digests[-1] if self.digests else 0
            self.digests.append(hash((before, self.tokens[len(self.digests)])))
        return self.digests[position]


class AutoregressiveDevice:
    """Feeds what is not computed, draws one token at the end. Checks the contract of every plan on the way."""

    traits = DecodeTraits()

    def __init__(self, num_blocks: int, rng: random.Random) -> None:
        self.memory = [0] * (num_blocks * 4)
        self.rng = rng
        self.states: dict[str, State] = {}
        self.writing: dict[int, dict[int, str]] = {}  # step in flight -> block -> who may write there

    def execute(self, plan: StepPlan) -> StepOutput:
        self.drop(plan.dropped)
        for admission in plan.admitted:
            self.admit(admission)
        self.guard(plan)
        return StepOutput(plan.step, tuple(self.run(item, self.states[item.request_id]) for item in plan.items))

    def drop(self, request_ids: tuple[str, ...]) -> None:
        for request_id in request_ids:
            self.states.pop(request_id, None)

    def admit(self, admission: Admission) -> None:
        request = admission.request
        assert request.id not in self.states, "admitted twice"
        self.states[request.id] = State(request, [*request.prompt_ids, *admission.output_ids])
        self.states[request.id].num_computed = -1  # the first share says how much is cached

    def guard(self, plan: StepPlan) -> None:
        """No block that a step in flight or this one may write is in the table of another request."""
        assert len({item.request_id for item in plan.items}) == len(plan.items)
        self.writing[plan.step] = {
            block: item.request_id for item in plan.items for block in item.block_ids[item.start // 4 :]
        }
        for writers in self.writing.values():
            for item in plan.items:
                for block in item.block_ids:
                    assert writers.get(block, item.request_id) == item.request_id, f"block {block} is being written"

    def feed(self, item: ScheduledSeq, state: State) -> int:
        """Check and write a share's known tokens; the position after them."""
        if state.num_computed < 0:
            state.num_computed = item.start
        if item.pending:
            assert not item.tokens and state.num_computed <= item.start
        else:
            assert item.start == state.num_computed
            assert list(item.tokens) == state.tokens[item.start : item.start + len(item.tokens)]
        start = state.num_computed
        end = len(state.tokens) if item.pending else start + len(item.tokens)
        assert end + item.lookahead <= len(item.block_ids) * 4
        for position in range(start):
            assert self.memory[self.slot(item, position)] == state.digest(position), f"stale KV at {position}"
        for position in range(start, end):
            self.memory[self.slot(item, position)] = state.digest(position)
        return end

    def slot(self, item: ScheduledSeq, position: int) -> int:
        return item.block_ids[position // 4] * 4 + position % 4

    def commit(self, state: State, tokens: list[int], num_computed: int) -> SeqResult:
        state.tokens += tokens
        state.num_computed = num_computed
        return SeqResult(state.request.id, tuple(tokens), num_computed)

    def run(self, item: ScheduledSeq, state: State) -> SeqResult:
        end = self.feed(item, state)
        sampled = [truth(state.request, end)] if end == len(state.tokens) else []
        return self.commit(state, sampled, end)


class SpeculativeDevice(AutoregressiveDevice):
    """Drafts up to `lookahead` tokens, of which 70 % are right, and always adds one token without KV."""

    traits = DecodeTraits(lookahead=5, drafts=True)

    def run(self, item: ScheduledSeq, state: State) -> SeqResult:
        assert item.lookahead <= state.request.speculation.bound(self.traits.lookahead)
        end = self.feed(item, state)
        if end < len(state.tokens):
            assert item.lookahead == 0, "drafts were granted to a prompt that is cut"
            return self.commit(state, [], end)
        drafted, accepted = self.rng.randint(0, item.lookahead), 0
        while accepted < drafted and self.rng.random() < 0.7:
            accepted += 1
        tokens = [truth(state.request, end + index) for index in range(accepted + 1)]
        result = self.commit(state, tokens, end + accepted)
        for index in range(drafted):
            value = state.digest(end + index) if index < accepted else JUNK
            self.memory[self.slot(item, end + index)] = value
        return replace(result, drafted=drafted, accepted=accepted)


class Driver:
    """Runs a scheduler on a device as the engine core does, and recounts everything after every call."""

    def __init__(self, scheduler: Scheduler, device: AutoregressiveDevice, lag: int = 0) -> None:
        self.scheduler = scheduler
        self.device = device
        self.lag = lag
        self.in_flight: deque[StepOutput] = deque()
        self.updates: defaultdict[str, list[SeqUpdate]] = defaultdict(list)
        self.fails: set[str] = set()  # ids whose next result is an error
        self.failing_step = False  # the next step that comes back has failed

    def step(self) -> StepPlan:
        """Plan, submit, and take in the results that are due."""
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        assert plan.items or plan.dropped or self.in_flight or not self.scheduler.has_work(), "stuck"
        if plan.items or plan.dropped:
            self.in_flight.append(self.device.execute(plan))
        while len(self.in_flight) > (self.lag if plan.items else 0):
            self.collect()
        return plan

    def collect(self) -> None:
        """Take in the oldest step's results."""
        output = self.in_flight.popleft()
        del self.device.writing[output.step]
        results = [replace(r, error="NaN") if r.request_id in self.fails else r for r in output.results]
        self.fails.difference_update(result.request_id for result in results)
        if self.failing_step and results:
            updates = self.scheduler.fail_step(output.step, "out of memory")
            self.failing_step = False
        else:
            updates = self.scheduler.update(StepOutput(output.step, tuple(results)))
        for update in updates:
            assert not self.finish(update.request_id), "news after the end"
            self.updates[update.request_id].append(update)
        self.scheduler.check_integrity()

    def drain(self, limit: int = 5000) -> None:
        """Run until nothing is left, then see that nothing was left behind."""
        for _ in range(limit):
            if not self.scheduler.has_work():
                break
            self.step()
        assert not self.scheduler.has_work(), "the work never ended"
        assert not self.device.states and not self.in_flight
        stats = self.scheduler.stats()
        assert (stats.kv_blocks_used, stats.running, stats.waiting) == (0, 0, 0)

    def finish(self, request_id: str) -> FinishReason | None:
        updates = self.updates.get(request_id)
        return updates[-1].finish if updates else None

    def tokens(self, request_id: str) -> list[int]:
        return [token for update in self.updates[request_id] for token in update.token_ids]
