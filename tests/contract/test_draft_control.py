"""Draft control over real networks: what is measured, what the control does with it, and that no token changes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from engine.config import DraftConfig
from engine.pipelines.speculative import SpeculativePipeline
from engine.pipelines.survival import SurvivalByKind
from engine.runtime.costs import COSTED, DRAFTED, Costs, measure_draft_costs
from engine.runtime.worker import LocalWorker
from engine.types import Request
from tests.contract import neural
from tests.contract.ladder import Ladder, Outcome, assert_same, load_worker, request
from tests.draft_load import DRAFTS, STEPS
from tests.families import VOCAB, family, save_random

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("dflash", "tree", "eagle3")
TABLE = Costs(STEPS, DRAFTS, STEPS)
FLAT = Costs(((1, 1.0), (64, 1.0)), ((1, 0.1), (32, 0.1)), ((1, 1.0), (64, 1.0)))  # width is free, drafts are cheap
DEAR = Costs(((1, 1.0), (64, 64.0)), ((1, 1.0), (32, 2.0)), ((1, 1.0), (64, 64.0)))

Workers = Mapping[str, LocalWorker]


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    before = torch.get_num_threads()
    folder, config = tmp_path_factory.mktemp("control"), family("llama-tied").config()
    save_random(config, folder / "target")
    paths = {"dflash": neural.save_dflash(config, folder / "d"), "eagle3": neural.save_eagle3(config, folder / "e")}
    drafts: dict[str, DraftConfig | None] = {
        "dflash": DraftConfig("helped-dflash", path=str(paths["dflash"])),
        "tree": DraftConfig("helped-dflash", path=str(paths["dflash"]), tree=9),
        "eagle3": DraftConfig("helped-eagle3", path=str(paths["eagle3"])),
        "ngram": DraftConfig("ngram"),
        "": None,
    }
    with neural.registered():
        yield {name: _worker(folder / "target", draft) for name, draft in drafts.items()}
    torch.set_num_threads(before)


def _worker(folder: Path, draft: DraftConfig | None) -> LocalWorker:
    return load_worker(folder, memory="3MiB", threads=1, draft=draft, adaptive=True)


@pytest.fixture(autouse=True)
def nobody_is_helped() -> None:
    neural.ANSWERS.clear()


def crowd(size: int, tokens: int = 24) -> list[Request]:
    rng = random.Random(2)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))] for _ in range(size)]
    return [request(f"r{i}", prompt, tokens, temperature=0.0) for i, prompt in enumerate(prompts)]


def priced(worker: LocalWorker, costs: Costs, **options: Any) -> Ladder:
    """Both halves of the control by the same table, with nothing learned yet."""
    pipeline = cast(SpeculativePipeline, worker._pipeline)
    pipeline._shaper._survival = SurvivalByKind()
    pipeline.set_costs(costs.steps, costs.drafts, costs.trees)
    return Ladder(worker, costs=costs, **options)


def expected(workers: Workers, requests: list[Request]) -> dict[str, Outcome]:
    return Ladder(workers[""]).run(requests)


def help_all(outcomes: Mapping[str, Outcome], requests: list[Request]) -> None:
    neural.ANSWERS.update({one.id: [*one.prompt_ids, *outcomes[one.id].tokens] for one in requests})


@pytest.mark.parametrize("kind", KINDS)
def test_draft_passes_are_measured_and_leave_nothing_behind(workers: Workers, kind: str) -> None:
    worker = workers[kind]
    capacity = worker.capacity()
    counts, seconds = zip(*capacity.draft_costs, strict=True)
    assert counts == DRAFTED and seconds[0] > 0 and list(seconds) == sorted(seconds)
    assert [count for count, _ in capacity.step_costs] == list(COSTED)
    assert worker.num_states() == 0
    drafter = worker._pipeline._drafter._drafter  # type: ignore[attr-defined]  # within the one that helps it
    assert not drafter._anchors
    few = measure_draft_costs(drafter, 3, 16, capacity.num_blocks, 5)
    assert [count for count, _ in few] == [1, 2, 4] and not drafter._anchors


def test_a_drafter_without_a_network_has_no_passes(workers: Workers) -> None:
    capacity = workers["ngram"].capacity()
    assert capacity.step_costs and not capacity.draft_costs
    assert not workers[""].capacity().step_costs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("costs", [TABLE, FLAT], ids=["table", "flat"])
def test_no_price_changes_a_token(workers: Workers, kind: str, costs: Costs) -> None:
    requests = crowd(6)
    outcomes = expected(workers, requests)
    help_all(outcomes, requests[::2])
    for options in ({}, {"lag": 1, "chunk": 16}, {"num_blocks": 9}):
        ladder = priced(workers[kind], costs, **options)
        assert assert_same(outcomes, ladder.run(requests)) == 0, options
        assert ("num_blocks" in options) == (ladder.stats.preemptions > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_as_measured_on_this_machine_no_token_changes(workers: Workers, kind: str) -> None:
    requests = crowd(5)
    outcomes = expected(workers, requests)
    help_all(outcomes, requests)
    capacity = workers[kind].capacity()
    ladder = priced(workers[kind], Costs(capacity.step_costs, capacity.draft_costs))
    assert assert_same(outcomes, ladder.run(requests)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_that_stand_are_made_for_one_stream_and_dear_ones_are_not(workers: Workers, kind: str) -> None:
    requests = crowd(1, tokens=60)
    outcomes = expected(workers, requests)
    help_all(outcomes, requests)
    alone = priced(workers[kind], TABLE)
    alone.run(requests)
    assert alone.stats.spec_accepted > 30 and alone.stats.steps < 35
    dear = priced(workers[kind], DEAR)
    dear.run(requests)
    assert dear.stats.spec_rounds < 5 and dear.stats.steps > 50


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_that_fall_are_given_up_and_a_crowd_is_left_alone(workers: Workers, kind: str) -> None:
    (one,) = requests = crowd(1, tokens=100)
    alone = priced(workers[kind], TABLE)
    alone.run(requests)
    assert alone.stats.spec_rounds < 30, f"of {alone.stats.steps} steps for {one.id}"
    many = crowd(32, tokens=12)
    together = priced(workers[kind], TABLE)
    together.run(many)
    assert together.stats.spec_rounds < 0.2 * 32 * 12
