"""Lives of requests under dual_diffusion: preempted, resumed, aborted, broken; and what its steps cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
import torch

from engine.core import EngineCore
from engine.diffusion import BLOCK_CAUSAL, FULL, DiffusionSpec
from engine.errors import ConfigError
from engine.pipelines.dual_diffusion import DualDiffusionPipeline
from engine.pipelines.masked_diffusion import MaskedDiffusionPipeline
from engine.protocols import ForwardRunner
from engine.runtime.batch import AttentionMode, SeqInput
from engine.runtime.runner import ModelRunner
from engine.types import Admission, FinishReason, Passes, Request, ScheduledSeq, StepPlan
from tests.numeric.dual_drive import FULL_SPEC, PAGE, Outcome, pipeline, request, rules, run, runner
from tests.numeric.dual_reference import MASK, VOCAB, Setting, tiny_llama

PROMPT = (3, 1, 4, 1, 5, 9)
Calm = Callable[[str], dict[str, Outcome]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def served() -> ModelRunner:
    return runner(tiny_llama(0))


@pytest.fixture(scope="module")
def drafter() -> ModelRunner:
    return runner(tiny_llama(1))


@pytest.fixture(scope="module")
def calm(served: ModelRunner, drafter: ModelRunner) -> Calm:
    """What `some` requests come to when nothing happens to them."""
    return cache(lambda kind: run(made(kind, served, drafter), some(kind))[0])


@dataclass
class NoisyRunner:
    """Logits are new noise in every pass, or no numbers where a token is fed that breaks it."""

    bad: int = -1
    vocab_size: int = VOCAB
    block_size: int = PAGE
    calls: list[tuple[AttentionMode, list[int]]] = field(default_factory=list)

    def compact(self, source: torch.Tensor, target: torch.Tensor) -> None:
        raise AssertionError("nothing is moved")

    def forward(
        self,
        inputs: Sequence[SeqInput],
        rows: Sequence[int],
        mode: AttentionMode = AttentionMode.CAUSAL,
        block_length: int = 1,
    ) -> torch.Tensor:
        self.calls.append((mode, [len(item.ids) for item in inputs]))
        logits = torch.randn(sum(len(item.ids) for item in inputs), VOCAB) * 3
        broken = [self.bad in item.ids for item in inputs for _ in item.ids]
        logits[torch.tensor(broken)] = torch.nan
        return logits[list(rows)]

    def forward_with_states(
        self,
        inputs: Sequence[SeqInput],
        rows: Sequence[int],
        mode: AttentionMode = AttentionMode.CAUSAL,
        block_length: int = 1,
        *,
        read: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("nobody asks for states")


PAIRS = {"same": Setting(), "full": Setting(), "block": Setting(unit=4)}


def made(kind: str, served: ForwardRunner, drafter: ForwardRunner) -> DualDiffusionPipeline:
    return pipeline(served, None if kind == "same" else drafter, PAIRS[kind])


def some(kind: str, count: int = 5) -> list[Request]:
    """Of different prompts, settings and temperatures."""
    verifies = ("confidence", "masked_copy", "exact", "trust", "both")
    return [
        request(
            f"r{i}",
            PROMPT[: 2 + i],
            replace(PAIRS[kind], verify=verifies[i], temperature=0.7 * (i % 2), seed=i, canvas=6 + 3 * i, least=0.3),
            logprobs=0,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("kind", PAIRS)
def test_preempted_is_undisturbed(kind: str, served: ModelRunner, drafter: ModelRunner, calm: Calm) -> None:
    """By a request that goes before them; and with room for few of them in a step."""
    urgent = request("urgent", (7,) * 60, replace(PAIRS[kind], canvas=40, verify="trust", threshold=0.0))
    found, preemptions = run(
        made(kind, served, drafter), some(kind), num_blocks=30, later=[replace(urgent, priority=-1)]
    )
    assert preemptions > 1 and len(found["urgent"].tokens) == 40
    tight, _ = run(made(kind, served, drafter), some(kind), budget=36)
    for name, one in calm(kind).items():
        assert found[name].tokens == tight[name].tokens == one.tokens
        assert found[name].pieces == tight[name].pieces == one.pieces
        said = [[entry.logprob for entry in each.logprobs] for each in (found[name], one)]
        assert said[0] == pytest.approx(said[1], abs=1e-4)


@pytest.mark.parametrize("kind", PAIRS)
def test_resumed_goes_on_as_it_was(kind: str, served: ModelRunner, drafter: ModelRunner, calm: Calm) -> None:
    """From a block's end or from inside a block, which no answer ends at, with what is told not told again."""
    for one in some(kind, 4):
        whole = calm(kind)[one.id].tokens
        for told in (2, 4):
            rest = resume(made(kind, served, drafter), one, whole[:told])
            assert whole[:told] + rest == whole


def resume(pipe: DualDiffusionPipeline, one: Request, told: list[int]) -> list[int]:
    """What it writes after `told`; grants are the largest that a scheduler would make."""
    table, written, start, step = tuple(range(20)), [*one.prompt_ids, *told], 0, 0
    admitted: tuple[Admission, ...] = (Admission(one, tuple(told)),)
    end = len(one.prompt_ids) + one.diffusion.canvas
    while len(written) < end:
        item = ScheduledSeq(one.id, start, tuple(written[start:]), end + 8 - len(written), table)
        (result,) = pipe.execute(StepPlan(step, (item,), admitted)).results
        assert result.error is None and result.logprobs is not None
        assert len(result.logprobs) == len(result.new_tokens)
        written += result.new_tokens
        start, admitted, step = result.num_computed, (), step + 1
        assert step < 200
    return written[len(one.prompt_ids) + len(told) :]


@pytest.mark.parametrize("kind", PAIRS)
def test_an_abort_leaves_nothing(kind: str, served: ModelRunner, drafter: ModelRunner, calm: Calm) -> None:
    """`run` checks the pool after each step, and the pipeline's states at the end."""
    steps = 0

    def watch(core: EngineCore) -> None:
        nonlocal steps
        steps += 1
        if steps % 3 == 0:
            core.abort([f"r{steps // 3}"])

    found, _ = run(made(kind, served, drafter), some(kind), watch=watch)
    assert any(one.finish is FinishReason.ABORT for one in found.values())
    assert found["r0"].tokens == calm(kind)["r0"].tokens
    for name, one in found.items():
        assert one.tokens == calm(kind)[name].tokens[: len(one.tokens)]


@pytest.mark.parametrize("verify", ["exact", "confidence", "both", "masked_copy"])
@pytest.mark.parametrize("kind", PAIRS)
def test_it_ends_whatever_the_verifier_says(kind: str, verify: str) -> None:
    """Nothing ever stands, and each verify step still makes a token final: no more of them than tokens."""
    torch.manual_seed(0)
    setting = replace(PAIRS[kind], verify=verify, least=1.5, canvas=24, steps=100, threshold=0.0)
    found, _ = run(made(kind, NoisyRunner(), NoisyRunner()), [request("a", PROMPT, setting)])
    got = found["a"]
    assert len(got.tokens) == 24 and MASK not in got.tokens and got.finish is FinishReason.LENGTH
    assert got.passes.verifies <= 24
    if kind != "same":  # else blocks are full after their first pass, which is exact
        assert got.passes.verifies == got.passes.forwards
    tight = replace(setting, threshold=2.0, steps=2)
    got = run(made(kind, NoisyRunner(), NoisyRunner()), [request("a", PROMPT, tight)])[0]["a"]
    assert len(got.tokens) == 24 and 0 < got.passes.verifies <= 24 and got.passes.remasked > 5


def test_trust_without_end_is_the_dual_sampler(served: ModelRunner) -> None:
    """Drafting all of a block and verifying nothing: masked_diffusion's dual cache, pass by pass."""
    for setting in (Setting(threshold=0.5), Setting(threshold=2.0, block=6, temperature=0.6)):
        one = request("a", PROMPT, replace(setting, verify="trust", steps=1000, canvas=16), logprobs=0)
        plain = run(MaskedDiffusionPipeline(served, FULL_SPEC, rules()), [one])[0]["a"]
        got = run(pipeline(served, None, setting), [one])[0]["a"]
        assert (got.tokens, got.logprobs, got.passes) == (plain.tokens, plain.logprobs, plain.passes)
        assert got.passes.forwards > 5


def test_exact_drafts_and_trust_are_the_plain_sampler(served: ModelRunner) -> None:
    """Without a cache every pass is exact, and who drafts is who verifies: masked_diffusion without a cache."""
    for steps in (1, 2, 5):
        one = request("a", PROMPT, Setting(verify="trust", steps=steps, canvas=16, threshold=0.6))
        one = replace(one, diffusion=replace(one.diffusion, cache="none"))
        plain = run(MaskedDiffusionPipeline(served, FULL_SPEC, rules()), [one])[0]["a"]
        got = run(pipeline(served, None, Setting()), [one])[0]["a"]
        assert got.tokens == plain.tokens and got.passes.forwards == plain.passes.forwards
        assert (got.passes.verifies > 0) is (steps < 5)


@pytest.mark.parametrize("kind", PAIRS)
def test_requests_share_passes(kind: str) -> None:
    """A step makes one pass of each model at most, and one more of the served one where copies are verified."""
    torch.manual_seed(1)
    mine, theirs = NoisyRunner(), NoisyRunner()
    pipe = made(kind, mine, theirs)
    before = [0, 0]

    def watch(_: EngineCore) -> None:
        calls = [mine.calls[before[0] :], theirs.calls[before[1] :]]
        modes = [mode for mode, _ in calls[0]]
        assert len(modes) == len(set(modes)) and set(modes) <= {AttentionMode.BIDIRECTIONAL, AttentionMode.TREE}
        assert len(calls[1]) <= 1 and (kind != "same" or not calls[1])
        before[:] = len(mine.calls), len(theirs.calls)

    found, _ = run(pipe, some(kind), watch=watch)
    passes = Passes()
    for one in found.values():
        passes = passes.plus(one.passes)
    counted = [sum(len(sizes) for _, sizes in each.calls) for each in (mine, theirs)]
    assert counted == [passes.forwards, passes.draft_forwards]
    fed = [sum(sum(sizes) for _, sizes in each.calls) for each in (mine, theirs)]
    assert fed == [passes.positions - passes.draft_positions, passes.draft_positions]
    assert max(len(sizes) for _, sizes in mine.calls) > 1


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("broken", ["served", "drafter"])
def test_what_is_no_number_ends_its_own_request(kind: str, broken: str) -> None:
    torch.manual_seed(2)
    bad = 11
    mine, theirs = NoisyRunner(bad if broken == "served" else -1), NoisyRunner(bad if broken == "drafter" else -1)
    ill = request("ill", (bad, 2, 3), replace(PAIRS[kind], temperature=0.0), bad_words=((bad,),))
    well = request("well", PROMPT, replace(PAIRS[kind], verify="both"), bad_words=((bad,),))
    found, _ = run(made(kind, mine, theirs), [ill, well])
    assert found["well"].error is None and len(found["well"].tokens) == 12
    if broken == "drafter" and kind == "same":
        assert found["ill"].error is None
    else:
        assert found["ill"].finish is FinishReason.ERROR and "not a number" in (found["ill"].error or "")


def test_closed_blocks_leave_and_stops_are_kept(served: ModelRunner) -> None:
    setting = Setting(canvas=16, threshold=0.7)
    whole = run(pipeline(served, None, setting), [request("a", PROMPT, setting)])[0]["a"]
    assert all(size % 4 == 0 for size in whole.pieces)
    stop = whole.tokens[9]
    one = replace(request("a", PROMPT, setting), eos_ids=(stop,))
    ended = run(pipeline(served, None, setting), [one])[0]["a"]
    assert ended.tokens == whole.tokens[: whole.tokens.index(stop) + 1] and ended.finish is FinishReason.STOP
    first = replace(one, eos_ids=(whole.tokens[0],))  # final after a pass or two, when most of its block is masks
    soon = run(pipeline(served, None, setting), [first])[0]["a"]
    assert soon.tokens == whole.tokens[:1] and soon.passes.forwards <= 2
    cut = run(pipeline(served, None, setting), [request("a", PROMPT, setting, max_tokens=6)])[0]["a"]
    assert cut.tokens == whole.tokens[:6] and cut.finish is FinishReason.LENGTH
    late = replace(one, sampling=replace(one.sampling, min_tokens=16))
    assert stop not in run(pipeline(served, None, setting), [late])[0]["a"].tokens


def test_an_answer_ends_with_its_canvas(served: ModelRunner) -> None:
    one = request("a", PROMPT, Setting(canvas=8), max_tokens=20)
    found = run(pipeline(served, None, Setting()), [one])[0]["a"]
    assert len(found.tokens) == 8 and found.finish is FinishReason.LENGTH


def test_models_that_do_not_fit_are_refused(served: ModelRunner) -> None:
    block = DiffusionSpec(BLOCK_CAUSAL, MASK, block_length=4)
    with pytest.raises(ConfigError, match="block-causal"):
        DualDiffusionPipeline(served, block, rules())
    with pytest.raises(ConfigError, match="mask"):
        DualDiffusionPipeline(served, FULL_SPEC, rules(), NoisyRunner(), replace(block, mask_id=3))
    with pytest.raises(ConfigError, match="block"):
        DualDiffusionPipeline(served, FULL_SPEC, rules(), NoisyRunner(block_size=8), block)
    traits = DualDiffusionPipeline(served, FULL_SPEC, rules(), NoisyRunner(), block).traits
    assert traits.canvas and traits.denoises and not traits.chunkable and not traits.prefix_cacheable
    assert traits.unit == 4 and DualDiffusionPipeline(served, DiffusionSpec(FULL, MASK), rules()).traits.unit == 1
