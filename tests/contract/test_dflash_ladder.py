"""The equality ladder for draft networks: no draft changes a token, and no surroundings change a draft.

The second is what other engines lose. A draft's context is written for every position of every request, whether it is
drafted for or not, so what the network says is the same over a cached prefix that somebody without drafts has left,
after a preemption, for each of n choices and behind a prompt in pieces. What it says is compared itself: its tokens,
and how sure it is of each.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import DraftConfig
from engine.models.dflash.spec import DraftLayer
from engine.protocols import Worker
from engine.reading import Reading
from engine.types import Request, SamplingParams, SpeculationParams
from tests.contract import neural
from tests.contract.ladder import Ladder, Outcome, assert_same, load_worker, request
from tests.contract.neural import Said
from tests.contract.test_ladder import RUNGS, SAMPLING
from tests.families import VOCAB, family, save_random

# Targets: tied head, two kinds of layers and scaled embeddings, experts, sinks. Drafts: plain; windows, causal and not;
# anchors that predict, over a smaller vocabulary; one drafted token after another.
DRAFTS: dict[str, dict[str, Any]] = {
    "llama-tied": {},
    "gemma3_text": {"layers": (DraftLayer(window=7, causal=True), DraftLayer())},
    "qwen2_moe": {"anchor_predicts": True, "draft_vocab_size": 60, "block_size": 5},
    "gpt_oss": {"markov_rank": 8},
}
PAIRS = (
    *(("llama-tied", drafter) for drafter in ("dflash", "tree", "eagle3")),
    *(("gemma3_text", "dflash"), ("qwen2_moe", "tree"), ("gpt_oss", "dflash"), ("gpt_oss", "eagle3")),
)
CLOSE = 2e-3  # of margins: rounding of hidden states, through a network of random weights
OFF = SpeculationParams(enabled=False)
SCARCE = {"preempted": {"num_blocks": 8}, "preempted, lag 1, chunked": {"num_blocks": 8, "lag": 1, "chunk": 16}}
LADDER: dict[str, dict[str, Any]] = {**RUNGS, **SCARCE}
FEW = ("batched", "lag 1, chunked", "preempted")  # between them they hold every disturbance

Place = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Scene:
    """One target with one kind of draft, and what it does undisturbed.

    `earlier` are requests that nobody is drafted for; prompts of `requests` go on from what these get. `expected`:
    the answers of the target by itself. `cold`: what the network says, alone, with nothing cached, never helped.
    """

    worker: Worker
    chains: bool
    earlier: list[Request]
    requests: list[Request]
    expected: dict[str, Outcome]
    cold: dict[Place, Said] = field(repr=False)

    def help(self) -> None:
        """From now on most drafted tokens are right."""
        neural.ANSWERS.update({one.id: [*one.prompt_ids, *self.expected[one.id].tokens] for one in self.requests})


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    threads = torch.get_num_threads()
    (name, drafter), folder = request.param, tmp_path_factory.mktemp("networks")
    config = family(name).config()
    save_random(config, folder / "target")
    if drafter == "eagle3":
        path = neural.save_eagle3(config, folder / "draft")
    else:
        path = neural.save_dflash(config, folder / "draft", **DRAFTS[name])
    network = "eagle3" if drafter == "eagle3" else "dflash"
    draft = DraftConfig(f"helped-{network}", path=str(path), tree=9 if drafter == "tree" else 0)
    plain = load_worker(folder / "target", memory="3MiB", threads=1)
    earlier, requests = workload(plain)
    expected = alone(plain, requests)
    assert len({tuple(outcome.tokens) for outcome in expected.values()}) > 6, "too uniform to tell"
    with neural.registered():
        worker = load_worker(folder / "target", memory="3MiB", threads=1, draft=draft)
    neural.SAID.clear()
    assert assert_same(expected, alone(worker, requests)) == 0
    yield Scene(worker, drafter != "tree", earlier, requests, expected, said())
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    neural.ANSWERS.clear()
    neural.SAID.clear()


def workload(plain: Worker) -> tuple[list[Request], list[Request]]:
    """Some requests, and others that go on from their answers; both part where blocks end, and elsewhere."""
    rng = random.Random(1)
    shared = [rng.randrange(VOCAB) for _ in range(37)]
    prompts = [
        [rng.randrange(VOCAB) for _ in range(17)],
        shared,
        shared[:32] + [rng.randrange(VOCAB) for _ in range(5)],
    ]
    earlier = [request(f"e{i}", prompt, 24, temperature=0.0) for i, prompt in enumerate(prompts)]
    answers = Ladder(plain).run(earlier)
    told = [[*prompt, *answers[f"e{i}"].tokens] for i, prompt in enumerate(prompts)]
    asked = {
        "short": ([5], "greedy"),
        "behind one": (told[0][:39], "seeded"),
        "full blocks": (told[1][:48], "everything"),
    }
    asked |= {"long": (told[2][:59], "seeded"), "one more": (shared[:33], "greedy")}
    requests = [
        request(name, prompt, 16, **{"temperature": 0.0, **SAMPLING[how], "logprobs": None})
        for name, (prompt, how) in asked.items()
    ]
    for choice in range(3):
        one = request(f"choice {choice}", told[1][:44], 16, choice, temperature=1.0, seed=5, top_p=0.95)
        requests.append(replace(one, group="x"))
    return earlier, requests


def alone(worker: Worker, requests: Sequence[Request]) -> dict[str, Outcome]:
    """Each request by itself, with nothing cached."""
    outcomes: dict[str, Outcome] = {}
    for one in requests:
        outcomes |= Ladder(worker, prefix_cache=False).run([replace(one, group="")])
    return outcomes


def said() -> dict[Place, Said]:
    """What was said since the last call."""
    found = dict(neural.SAID)
    neural.SAID.clear()
    return found


def assert_said(expected: Mapping[Place, Said], got: Mapping[Place, Said], least: int) -> None:
    """Wherever both runs drafted, the network said the same; there are at least so many such places."""
    common = expected.keys() & got.keys()
    assert len(common) >= least, f"{len(common)} of {len(got)} drafts can be compared"
    for place in sorted(common):
        want, have = expected[place], got[place]
        for step, (a, b) in enumerate(zip(want.margins, have.margins, strict=False)):
            assert a == pytest.approx(b, abs=CLOSE), f"{place}, token {step}: margins {a:.4f} and {b:.4f}"
            if a < CLOSE:  # the two best tokens may have changed places, and what follows hangs on them
                break
            assert want.tokens[step] == have.tokens[step], f"{place}, token {step}"


@pytest.mark.parametrize("helped", [True, False], ids=["long accepts", "hardly any"])
def test_no_draft_changes_a_token_and_no_surroundings_a_draft(scene: Scene, helped: bool) -> None:
    if helped:
        scene.help()
    accepted = 0
    for name in LADDER if helped else FEW:
        ladder = Ladder(scene.worker, **LADDER[name])
        assert assert_same(scene.expected, ladder.run(scene.requests)) == 0, name
        assert ("preempted" in name) == (ladder.stats.preemptions > 0), f"{name}: {ladder.stats.preemptions}"
        accepted += ladder.stats.spec_accepted
        assert_said(scene.cold, said(), least=20 if helped else 40)
    assert accepted > 250 or not helped, f"{accepted}: too few accepts to tell anything"


def test_over_a_prefix_that_nobody_was_drafted_for(scene: Scene) -> None:
    """A is never drafted for; B finds A's blocks. Drafts and acceptance of B are those of a cold start."""
    ladder = Ladder(scene.worker)
    ladder.run([replace(one, speculation=OFF) for one in scene.earlier])
    assert not said() and ladder.stats.spec_drafted == 0
    outcomes = ladder.run(scene.requests)
    assert assert_same(scene.expected, outcomes) == 0
    found = {name: outcome.cached_tokens for name, outcome in outcomes.items()}
    assert (found["behind one"], found["full blocks"], found["long"], found["one more"]) == (32, 32, 48, 32)
    assert_said(scene.cold, said(), least=60)
    if not scene.chains:  # how large a tree is hangs on who else is there
        return
    scene.help()
    alone(scene.worker, scene.requests)
    cold = said()  # where a draft is made tells what was accepted before
    ladder = Ladder(scene.worker)
    ladder.run([replace(one, speculation=OFF) for one in scene.earlier])
    for one in scene.requests:
        ladder.run([replace(one, group="")])
    warm = said()
    # With one token left to feed a draft comes a step sooner than behind a whole prompt.
    assert {place[0] for place in warm.keys() ^ cold.keys()} <= {"one more"}
    assert ladder.stats.prefix_hits > 200


def test_over_a_prefix_that_a_reading_has_left(scene: Scene) -> None:
    """A reading drafts nothing, and leaves the draft's context behind like any other request."""
    ladder = Ladder(scene.worker, chunk=32)
    nothing = SamplingParams(max_tokens=0, temperature=0.0)
    prompts = dict.fromkeys(one.prompt_ids for one in scene.requests)
    reads = [Request(f"read {i}", ids, nothing, reading=Reading("mean")) for i, ids in enumerate(prompts)]
    assert all(outcome.reading for outcome in ladder.run(reads).values())
    assert not said() and ladder.stats.spec_drafted == 0
    outcomes = ladder.run(scene.requests)
    assert assert_same(scene.expected, outcomes) == 0
    assert sum(outcome.cached_tokens for outcome in outcomes.values()) > 150
    assert_said(scene.cold, said(), least=60)


def test_any_bound_gives_the_same_tokens(scene: Scene) -> None:
    """Requests of every bound side by side, some without drafts, some that end inside a draft."""
    scene.help()
    wishes = [*(SpeculationParams(max_draft=most) for most in (3, 1, 0, 50)), OFF]
    requests, expected, ended = [], {}, 0
    for i, one in enumerate(scene.requests):
        tokens = expected[one.id] = scene.expected[one.id].tokens
        sampling = one.sampling
        fresh = next((at for at in range(5 + i, len(tokens)) if tokens[at] not in tokens[:at]), None)
        if fresh is not None:  # an answer's end, where it first says this
            sampling, ended = replace(sampling, stop_token_ids=(tokens[fresh],)), ended + 1
            expected[one.id] = tokens[: fresh + 1]
        requests.append(replace(one, sampling=sampling, speculation=wishes[i % len(wishes)]))
    assert ended > 2
    ladder = Ladder(scene.worker)
    outcomes = ladder.run(requests)
    assert {name: outcome.tokens for name, outcome in outcomes.items()} == expected
    assert ladder.stats.spec_accepted > 10


def test_random_aborts_leave_nothing_behind(scene: Scene) -> None:
    rng = random.Random(4)
    requests = [
        request(f"a{i}", [rng.randrange(9) for _ in range(rng.randint(1, 40))], rng.randint(1, 24), seed=i)
        for i in range(16)
    ]
    ladder = Ladder(scene.worker, num_blocks=14, chunk=32, lag=1)
    outcomes = ladder.run(requests, lambda _: ladder.core.abort([rng.choice(requests).id]))
    assert all(outcome.finish is not None for outcome in outcomes.values())


def test_an_honest_draft_is_accepted_as_often_in_any_surroundings(tmp_path: Path) -> None:
    """Nobody helps this one: what is accepted of its drafts hangs on its context alone."""
    model = save_random(family("llama-tied").config(), tmp_path / "target")
    neural.save_echo(model, tmp_path / "draft")
    plain = load_worker(tmp_path / "target", memory="3MiB", threads=1)
    earlier, _ = workload(plain)
    told = Ladder(plain).run(earlier)
    prompts = {one.id: [*one.prompt_ids, *told[one.id].tokens[:18]] for one in earlier}
    requests = [request(f"{name}+", prompt, 40, temperature=0.0) for name, prompt in prompts.items()]
    expected = alone(plain, requests)
    with neural.registered():
        draft = DraftConfig("helped-dflash", path=str(tmp_path / "draft"))
        worker = load_worker(tmp_path / "target", memory="3MiB", threads=1, draft=draft)
    assert assert_same(expected, alone(worker, requests)) == 0
    cold = said()
    tokens = sum(len(outcome.tokens) for outcome in expected.values())
    assert tokens / len(cold) > 2.5, f"{tokens} tokens in {len(cold)} rounds"
    for name, options in {name: LADDER[name] for name in FEW}.items():
        ladder = Ladder(worker, **{**options, "num_blocks": 12} if "num_blocks" in options else options)
        if name == "batched":
            ladder.run([replace(one, speculation=OFF) for one in earlier])
        assert assert_same(expected, ladder.run(requests)) == 0
        found = said()
        assert_said(cold, found, least=10)
        if name == "batched":  # elsewhere drafts are cut: by a small step, or by scarce memory
            assert found.keys() == cold.keys()


def test_demo_model_with_a_draft_decodes_as_without(demo_folder: Path, tmp_path: Path) -> None:
    """fp32 and a helped draft of random weights; `python -m benchmarks.drafts agreement` is the large form."""
    rng = random.Random(5)
    prompts = [[rng.randrange(300, 40_000) for _ in range(n)] for n in (5, 40)]
    requests = [request(f"r{i}", prompt, 16, temperature=0.0, logprobs=2) for i, prompt in enumerate(prompts)]
    requests.append(request("s", prompts[0], 16, temperature=0.8, seed=1))
    expected = alone(load_worker(demo_folder, "none"), requests)
    config = family("llama").config(hidden_size=576, vocab_size=49152, num_hidden_layers=30)
    folder = neural.save_dflash(config, tmp_path, mask_token_id=16)
    with neural.registered():
        worker = load_worker(demo_folder, "none", draft=DraftConfig("helped-dflash", path=str(folder)))
    neural.ANSWERS.update({one.id: [*one.prompt_ids, *expected[one.id].tokens] for one in requests})
    for options in (LADDER["lag 1, chunked"], {"num_blocks": 5}):
        ladder = Ladder(worker, **options)
        assert assert_same(expected, ladder.run(requests)) == 0
        assert ladder.stats.spec_accepted > 20
    assert ladder.stats.preemptions > 0
