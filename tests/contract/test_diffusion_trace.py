"""What is told of a canvas step by step comes to the answer, whatever happens around the request.

Of each layout: full attention with and without shift, block-causal with sub-blocks and without; and drafted with verify
steps, which take tokens back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from engine.config import EngineConfig, SchedulerConfig
from engine.core import EngineCore
from engine.diffusion import CanvasNews, CanvasStep
from engine.front.canvas_trace import CanvasTrace
from engine.protocols import Worker
from engine.types import FinishReason, Request
from tests.contract.ladder import Ladder, load_worker
from tests.contract.test_diffusion_ladder import KINDS, spec_of, workload
from tests.numeric import dual_drive
from tests.numeric.dual_reference import MASK, Setting, tiny_llama
from tests.tiny_diffusion import save_tiny_diffusion


@dataclass
class Told:
    """Of one request: the engine's steps and tokens, and what a client hears."""

    trace: CanvasTrace
    tokens: list[int] = field(default_factory=list)
    steps: list[CanvasStep] = field(default_factory=list)
    news: list[CanvasNews] = field(default_factory=list)
    finish: FinishReason | None = None


def traced(requests: Sequence[Request]) -> list[Request]:
    return [replace(one, diffusion=replace(one.diffusion, trace=True)) for one in requests]


def listen(core: EngineCore, requests: Sequence[Request], late: Sequence[Request] = ()) -> dict[str, Told]:
    """Run them to their ends; those of `late` come in one by one, a step after another."""
    found = {one.id: Told(CanvasTrace(one)) for one in [*requests, *late]}
    coming = list(late)
    for one in requests:
        core.add(one)
    while coming or core.has_work():
        if coming:
            core.add(coming.pop(0))
        for update in core.step().updates:
            told = found[update.request_id]
            told.tokens += update.token_ids
            told.steps += [update.canvas] if update.canvas is not None else []
            told.finish = update.finish
            told.news += told.trace.take(update.canvas, update.finish, len(told.tokens))
    return found


def last_state(told: Told) -> dict[int, int]:
    """The canvas as a client sees it in the end. Every step changes something, and takes back only what stood there."""
    view: dict[int, int] = {}
    for count, news in enumerate(told.news, start=1):
        assert news.step == count and all(0 <= place < news.room for place, _ in news.filled)
        assert all(place in view for place in news.remasked)
        assert all(view.get(place) != token for place, token in news.filled)
        for place in news.remasked:
            del view[place]
        view |= dict(news.filled)
        view = {place: token for place, token in view.items() if news.end is None or place < news.end}
    return view


def assert_told(told: Told, mask_id: int) -> None:
    assert told.finish in (FinishReason.STOP, FinishReason.LENGTH)
    assert last_state(told) == dict(enumerate(told.tokens))
    assert not any(token == mask_id for news in told.news for _, token in news.filled)


@pytest.fixture(scope="module", params=KINDS)
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    return load_worker(
        save_tiny_diffusion(request.param, tmp_path_factory.mktemp(request.param)), memory="8MiB", threads=1
    )


def test_the_last_state_is_the_answer_and_preemption_changes_nothing(worker: Worker) -> None:
    mask_id = spec_of(worker).mask_id
    requests = traced(workload(worker))
    calm = listen(Ladder(worker, prefix_cache=False).core, requests)
    core = Ladder(worker, num_blocks=9).core
    urgent = [replace(one, priority=-i) for i, one in enumerate(requests)]
    pushed = listen(core, [], late=urgent)
    assert core.stats().preemptions > 3
    assert any(len(told.steps) > len(calm[name].steps) for name, told in pushed.items()), "nothing was replayed"
    for one in requests:
        assert_told(calm[one.id], mask_id)
        assert len(calm[one.id].news) > 2
        assert pushed[one.id].news == calm[one.id].news, one.id


def test_an_end_hides_what_is_filled_in_behind_it(worker: Worker) -> None:
    """Every token of a calm run is made an end once: the trace stops behind the first place that holds it."""
    mask_id = spec_of(worker).mask_id
    plain = traced(workload(worker))[:3]
    calm = listen(Ladder(worker).core, plain)
    ended = [replace(one, eos_ids=(calm[one.id].tokens[7],)) for one in plain]
    for one in ended:
        (told,) = listen(Ladder(worker).core, [one]).values()
        assert_told(told, mask_id)
        assert told.finish is FinishReason.STOP and told.news[-1].end == len(told.tokens) <= 8


def test_who_does_not_ask_hears_nothing(worker: Worker) -> None:
    told = listen(Ladder(worker).core, workload(worker)[:2])
    assert not any(one.steps for one in told.values())


@pytest.mark.parametrize("kind", ["same", "block"])
def test_verified_tokens_are_told_with_what_is_taken_back(kind: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    served, drafter = (dual_drive.runner(tiny_llama(seed)) for seed in (0, 1))
    setting = Setting(unit=4, least=0.9, threshold=0.05, steps=3) if kind == "block" else Setting(least=0.9)
    requests = traced(
        [
            dual_drive.request(
                f"{verify}{i}", (3, 1, 4, 1, 5)[: 2 + i], replace(setting, verify=verify, seed=i, canvas=9 + 4 * i)
            )
            for i, verify in enumerate(("confidence", "both", "exact", "masked_copy"))
        ]
    )

    def run(blocks: int, late: Sequence[Request]) -> dict[str, Told]:
        pipeline = dual_drive.pipeline(served, None if kind == "same" else drafter, setting)
        core = EngineCore(
            dual_drive.PipelineWorker(pipeline, blocks), EngineConfig(scheduler=SchedulerConfig(max_batched_tokens=400))
        )
        return listen(core, [] if late else requests, late)

    calm = run(dual_drive.BLOCKS, ())
    pushed = run(14, [replace(one, priority=-i) for i, one in enumerate(requests)])
    torch.set_num_threads(threads)
    for one in requests:
        assert_told(calm[one.id], MASK)
        assert pushed[one.id].news == calm[one.id].news
    taken_back = sum(len(news.remasked) for told in calm.values() for news in told.news)
    assert taken_back > (20 if kind == "block" else 0)
    if kind == "block":
        assert any(len(told.steps) > len(calm[name].steps) for name, told in pushed.items()), "nothing was replayed"
