"""Steps that run ahead of the host: their tokens are those of the pipelines as they are, and they wait for nothing.

On a GPU the same function is captured (tests/gpu/test_graphs_gpu.py); here it runs as it is, over the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from engine.config import DraftConfig
from engine.pipelines.uniform import UniformPipeline
from engine.protocols import DraftProposal, StepHandle, TargetRows
from engine.reading import Probe, Reading
from engine.runtime.cuda_graphs import buckets
from engine.runtime.device_draw import RowDraws, draw
from engine.runtime.outbox import Flight, Outbox
from engine.runtime.sampler import Sampler, SamplingState
from engine.runtime.uniform_round import accept
from engine.runtime.uniform_steps import Seat, UniformSteps
from engine.runtime.worker import LocalWorker
from engine.types import FinishReason, Request, SamplingParams, SeqUpdate, StepOutput, StepPlan
from engine.verifiers.strict import StrictVerifier
from tests.contract.ladder import Ladder, Outcome, load_worker, request
from tests.contract.neural import save_echo
from tests.no_sync import HostSync, NoHostSync
from tests.tiny import save_tiny, tiny_model

RUNGS: dict[str, dict[str, int]] = {
    "as it is": {},
    "a step late": {"lag": 1},
    "in chunks": {"chunk": 37, "lag": 1},
    "joining and leaving": {"seqs": 3, "lag": 1},
    "preempted": {"num_blocks": 14, "lag": 1},
}
CPU = torch.device("cpu")


def requests() -> list[Request]:
    """Of different lengths, so that batches shrink through the sizes; greedy and drawn ones, and texts that repeat."""
    prompts = [[(7 * i + j * j) % 256 for j in range(length)] for i, length in enumerate((3, 17, 40, 70, 129))]
    prompts += [[7] * 30, [9] * 20]
    greedy = [request(f"greedy-{i}", prompt, 40 - 3 * i, temperature=0.0) for i, prompt in enumerate(prompts)]
    heats = (0.7, 1.0, 1.3)
    return greedy + [
        request(f"drawn-{i}", prompts[i], 30 - 5 * i, choice=i, temperature=heat, seed=-i - 1)
        for i, heat in enumerate(heats)
    ]


def tokens(outcomes: dict[str, Outcome]) -> dict[str, tuple[list[int], FinishReason | None]]:
    return {name: (outcome.tokens, outcome.finish) for name, outcome in outcomes.items()}


@dataclass(frozen=True, slots=True)
class Loaded:
    plain: LocalWorker
    ahead: LocalWorker
    expected: dict[str, Outcome]

    @property
    def steps(self) -> UniformSteps:
        pipeline = self.ahead._pipeline
        assert isinstance(pipeline, UniformPipeline) and isinstance(pipeline._steps, UniformSteps)
        return pipeline._steps


@pytest.fixture(scope="module", params=["", "draft"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """One checkpoint without a draft, and with one that is right where a text repeats itself."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("llama") / "model")
    draft = None
    if request.param:
        draft = DraftConfig("dflash", path=str(save_echo(tiny_model("llama"), folder.parent / "draft")))
    options = {"memory": "8MiB", "threads": 1, "attention": "sdpa"}
    plain = load_worker(folder, **options)  # type: ignore[arg-type]
    ahead = load_worker(folder, draft=draft, graphs="eager", **options)  # type: ignore[arg-type]
    return Loaded(plain, ahead, Ladder(plain).run(requests()))


@dataclass(frozen=True, slots=True)
class Noted:
    handle: StepHandle
    step: int
    log: list[tuple[str, int]]

    def result(self) -> StepOutput:
        self.log.append(("read", self.step))
        return self.handle.result()


@dataclass(slots=True)
class Watched:
    """A worker that notes when its steps are submitted and when their results are read."""

    worker: LocalWorker
    log: list[tuple[str, int]] = field(default_factory=list)

    def __getattr__(self, name: str) -> object:
        return getattr(self.worker, name)

    def submit(self, plan: StepPlan) -> StepHandle:
        self.log.append(("submitted", plan.step))
        handle = self.worker.submit(plan)

        return Noted(handle, plan.step, self.log)


@pytest.mark.parametrize("rung", RUNGS)
def test_tokens_are_those_of_the_pipeline_as_it_is(loaded: Loaded, rung: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[bool] = []
    launch = loaded.steps.launch

    def noted(seats: Sequence[Seat], *, drafts: bool = False) -> Flight:
        launched.append(drafts)
        return launch(seats, drafts=drafts)

    monkeypatch.setattr(loaded.steps, "launch", noted)
    ladder = Ladder(loaded.ahead, **RUNGS[rung])  # type: ignore[arg-type]
    got = ladder.run(requests())
    assert tokens(got) == tokens(loaded.expected)
    assert len(launched) > ladder.stats.steps // 3, "hardly any step was uniform"
    assert any(launched) == (loaded.steps.most > 0) == (ladder.stats.spec_accepted > 50)
    assert (ladder.stats.preemptions > 0) == (rung == "preempted")


def test_a_step_is_launched_before_the_last_one_is_read(loaded: Loaded) -> None:
    watched = Watched(loaded.ahead)
    Ladder(watched, lag=1).run(requests()[:4])  # type: ignore[arg-type]
    order = watched.log
    ahead = [step for step in range(2, 20) if order.index(("submitted", step)) < order.index(("read", step - 1))]
    assert len(ahead) >= 10


def test_what_the_device_can_not_draw_is_drawn_as_ever(loaded: Loaded) -> None:
    """A request with rules, one with a truncation and one with logprobs come and go among plain ones."""
    ruled = [
        request("penalty", [1, 2, 3] * 5, 6, temperature=0.8, repetition_penalty=1.3, seed=1),
        request("truncated", [4, 5, 6], 9, temperature=1.0, top_p=0.8, seed=2),
        request("told", [7, 8, 9], 12, temperature=0.0, logprobs=2),
    ]
    both = [*ruled, *requests()]
    want = Ladder(loaded.plain).run(both)
    got = Ladder(loaded.ahead, lag=1).run(both)
    assert tokens(got) == tokens(want)
    told = [(entry.token_id, entry.logprob) for entry in want["told"].logprobs]
    assert [entry.token_id for entry in got["told"].logprobs] == [token for token, _ in told]


def test_steps_wait_for_nothing(loaded: Loaded) -> None:
    """All bodies, under a watch that the next tests show to see what would wait."""
    queries = {1, loaded.steps.most + 1} | ({0} if loaded.steps.most else set())
    with NoHostSync():
        for query in queries:
            loaded.steps._pool.run((8, query))


def test_a_planted_wait_is_found(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = loaded.steps._runner.forward_batch
    plants: list[Callable[[torch.Tensor], object]] = [
        lambda logits: logits[0, 0].item(),
        lambda logits: logits[logits > 0],
        lambda logits: logits[[0]],
    ]
    for plant in plants:

        def planted(*args: torch.Tensor, plant: Callable[[torch.Tensor], object] = plant) -> torch.Tensor:
            logits = forward(*args)  # type: ignore[arg-type]
            plant(logits)
            return logits

        monkeypatch.setattr(loaded.steps._runner, "forward_batch", planted)
        with pytest.raises(HostSync), NoHostSync():
            loaded.steps._pool.run((1, 1))


X, YES = torch.arange(6.0), torch.arange(6) > 2
WAITS: dict[str, Callable[[], object]] = {
    "item": lambda: X[0].item(),
    "float": lambda: float(X[0]),
    "int": lambda: int(X[0]),
    "bool": lambda: bool(YES.any()),
    "tolist": X.tolist,
    "numpy": X.numpy,
    "range": lambda: range(torch.ones((), dtype=torch.int64)),
    "slice": lambda: X[YES.sum() :],
    "format": lambda: f"{X[0]:.1f}",
    "nonzero": X.nonzero,
    "where": lambda: torch.where(YES),
    "boolean index": lambda: X[YES],
    "masked_select": lambda: X.masked_select(YES),
    "unique": X.unique,
    "repeats": lambda: torch.repeat_interleave(X, YES.long()),
    "equal": lambda: torch.equal(X, X),
    "tensor of a list": lambda: torch.tensor([1, 2]),
    "index of a list": lambda: X[[1, 2]],
    "copy to another device": lambda: X.to("meta"),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_watch_sees_what_would_wait(name: str) -> None:
    with torch.inference_mode(), pytest.raises(HostSync), NoHostSync():
        WAITS[name]()


def test_a_request_whose_logits_are_no_numbers_ends_alone(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = loaded.steps._runner.forward_batch

    def poisoned(batch: object, wanted: torch.Tensor) -> torch.Tensor:
        logits = forward(batch, wanted)  # type: ignore[arg-type]
        bad = batch.positions.index_select(0, wanted) == 44  # type: ignore[attr-defined]
        return torch.where(bad.unsqueeze(1), torch.full_like(logits, float("nan")), logits)

    asked = [request("short", [1, 2, 3], 20, temperature=0.0), request("bad", list(range(40)), 20, temperature=0.0)]
    want = Ladder(loaded.plain).run(asked)
    monkeypatch.setattr(loaded.steps._runner, "forward_batch", poisoned)
    ladder = Ladder(loaded.ahead, lag=1)
    news: list[SeqUpdate] = []
    for one in asked:
        ladder.core.add(one)
    while ladder.core.has_work():
        news += ladder.core.step().updates
    ladder.core.settle()
    found = {name: [t for u in news if u.request_id == name for t in u.token_ids] for name in ("short", "bad")}
    errors = [update.request_id for update in news if update.error]
    assert errors == ["bad"] and found["short"] == want["short"].tokens
    assert found["bad"] == want["bad"].tokens[:5]  # the draw at position 44 gives token 45


def test_padding_touches_nobody(loaded: Loaded) -> None:
    """A step of five in a batch of eight writes to the blocks of the five, and to the one that is nobody's."""
    cache = loaded.ahead._pipeline._steps._runner.cache  # type: ignore[attr-defined]
    ladder = Ladder(loaded.ahead, prefix_cache=False)
    for one in requests()[:5]:
        ladder.core.add(one)
    for _ in range(4):
        ladder.core.step()
    marks = [layer.joint.clone() for layer in cache.layers]
    running = list(ladder.core._scheduler._roster.running)
    before = {block for seq in running for block in seq.block_ids}
    ladder.core.step()
    used = before | {block for seq in running for block in seq.block_ids}
    spare = cache.num_blocks - 1
    for layer, mark in zip(cache.layers, marks, strict=True):
        changed = (layer.joint != mark).any(1).view(cache.num_blocks, -1).any(1)
        assert set(changed.nonzero().flatten().tolist()) - {spare} <= used
    ladder.core.abort([one.id for one in requests()[:5]])
    while ladder.core.has_work():
        ladder.core.step()
    ladder.core.settle()


@pytest.mark.parametrize(("temperature", "seed"), [(0.0, 0), (1.0, 3), (0.6, -(2**63)), (1.7, 2**63 - 1)])
def test_draws_are_the_samplers_own(temperature: float, seed: int) -> None:
    logits = torch.randn(9, 515, generator=torch.Generator().manual_seed(1)) * 3
    logits[4, 7], logits[5] = float("nan"), float("-inf")
    logits[6, 100:200] = logits[6].amax()  # a tie
    sampling = SamplingParams(max_tokens=1, temperature=temperature, seed=seed)
    states = [SamplingState(Request(f"{i}", (0,) * (i + 1), sampling, choice=i % 3)) for i in range(9)]
    want = Sampler(515).sample(logits, states)
    draws = [state.draw() for state in states]
    rows = RowDraws(
        torch.tensor([[one.seed for one in draws], [one.choice for one in draws]]),
        torch.tensor([one.position for one in draws]),
        torch.full((9,), temperature),
    )
    assert draw(logits, rows).tolist() == want.tokens.masked_fill(want.failed, -1).tolist()


def test_acceptance_is_the_strict_verifiers() -> None:
    generator = torch.Generator().manual_seed(2)
    draws = torch.randint(-1, 3, (400, 5), generator=generator)
    drafts = torch.randint(0, 3, (400, 4), generator=generator)
    limits = torch.randint(0, 5, (400,), generator=generator)
    cut = drafts.masked_fill(torch.arange(4) >= limits.unsqueeze(1), -1)
    verdict = StrictVerifier().verify(DraftProposal(cut, tuple(limits.tolist())), TargetRows(draws))
    found, counts = accept(draws, drafts, limits)
    for row, count in enumerate(counts.tolist()):
        stand, following = int(verdict.accepted[row]), int(verdict.next_token[row])
        expected = drafts[row, :stand].tolist() + ([following] if following >= 0 else [])
        assert found[row, :count].tolist() == expected


def test_sizes_grow_as_batches_do() -> None:
    assert buckets(1) == (1,) and buckets(3) == (1, 2, 4) and buckets(20) == (1, 2, 4, 8, 16, 24)
    assert buckets(256)[-5:] == (192, 208, 224, 240, 256) and buckets(1000) == buckets(256)
    assert all(any(size >= n for size in buckets(n)) for n in range(1, 257))


def test_a_third_flight_does_not_lose_the_first() -> None:
    outbox, source = Outbox(2, 3, CPU), torch.zeros(2, 3, dtype=torch.int64)
    flights = []
    for turn in range(5):
        outbox.ready()
        flights.append(outbox.send(source.fill_(turn), 1 + turn % 2))
    assert [flight.rows() for flight in flights] == [[[turn] * 3] * (1 + turn % 2) for turn in range(5)]


def test_what_is_read_is_not_drawn(loaded: Loaded) -> None:
    """A prompt whose last token is fed alone looks like a decoding step, but nothing may follow it."""
    prompt, nothing = tuple(range(49)), SamplingParams(max_tokens=0, temperature=0.0)
    reading = Reading("last", probes=(Probe(49, (1, 2, 3)),))
    reads = [Request(f"read {i}", prompt[i:], nothing, reading=Reading("last")) for i in range(2)]
    reads.append(Request("law", prompt, nothing, reading=reading))
    writers = [request(f"text {i}", prompt[:9], 12, temperature=0.0) for i in range(2)]
    expected = Ladder(loaded.plain).run([*reads, *writers])
    got = Ladder(loaded.ahead, chunk=50, lag=1).run([*writers, *reads])
    alone = Ladder(loaded.ahead, chunk=48).run([reads[2]])  # two steps, the second of the last token alone
    for name in ("read 0", "read 1", "law"):
        for have in (got[name], *([alone[name]] if name in alone else [])):
            want = expected[name].reading
            assert want is not None and have.reading is not None and not have.tokens
            first, second = (np.frombuffer(one.vector, "<f4") for one in (want, have.reading))
            np.testing.assert_allclose(first, second, atol=1e-5)
            for law, other in zip(want.laws, have.reading.laws, strict=True):
                np.testing.assert_allclose(law.logprobs, other.logprobs, atol=1e-4)
    for one in writers:
        assert got[one.id].tokens == expected[one.id].tokens
