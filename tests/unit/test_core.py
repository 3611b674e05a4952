"""EngineCore over the real scheduler and a fake worker: steps, lag, failures, idleness."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig, SchedulerConfig
from engine.core import EngineCore
from engine.errors import EngineDead
from engine.types import Capacity, FinishReason, Request, SamplingParams, SeqUpdate, StepPlan
from tests.unit.denoising_fakes import BlockCausal
from tests.unit.fake_worker import (
    EARLY_EOS,
    EOS,
    FAIL_REQUEST,
    FAIL_RESULT,
    FAIL_SUBMIT,
    Done,
    FakeWorker,
    answer,
    write_checkpoint,
)
from tests.unit.fakes import VOCAB, expected, make_request

BOTH_LAGS = pytest.mark.parametrize("lag", [0, 1])


def make(tmp_path: Path, lag: int = 0, **script: Any) -> tuple[EngineCore, FakeWorker]:
    config = EngineConfig(scheduler=SchedulerConfig(max_num_seqs=4, max_batched_tokens=16, lag=lag))
    worker = FakeWorker(config, write_checkpoint(tmp_path, **script), lambda phase: None)
    return EngineCore(worker, config), worker


def request(name: str, prompt: tuple[int, ...] = (65, 66, 67), max_tokens: int = 5) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens), (EOS,))


def run(core: EngineCore) -> dict[str, list[SeqUpdate]]:
    """Step until nothing is left; the updates by request."""
    news: dict[str, list[SeqUpdate]] = {}
    while core.has_work():
        for update in core.step().updates:
            news.setdefault(update.request_id, []).append(update)
    core.settle()
    return news


def text(updates: list[SeqUpdate]) -> str:
    return "".join(map(chr, (token for update in updates for token in update.token_ids)))


@BOTH_LAGS
@pytest.mark.parametrize("lookahead", [0, 3])
def test_requests_run_to_their_ends(tmp_path: Path, lag: int, lookahead: int) -> None:
    core, worker = make(tmp_path, lag, lookahead=lookahead)
    lengths = {f"r{n}": n for n in range(1, 40, 5)}  # from one step to several chunks
    for name, length in lengths.items():
        core.add(request(name, (65,) * length, max_tokens=7))
    news = run(core)
    assert {name: text(updates) for name, updates in news.items()} == {n: answer(k, 7) for n, k in lengths.items()}
    assert all([u.finish for u in updates][-1] is FinishReason.LENGTH for updates in news.values())
    assert all(u.finish is None for updates in news.values() for u in updates[:-1])
    assert (worker.num_states(), core.stats().kv_blocks_used, core.stats().running, core.stats().waiting) == (0,) * 4


@BOTH_LAGS
def test_end_of_sequence_stops(tmp_path: Path, lag: int) -> None:
    core, _ = make(tmp_path, lag)
    core.add(request("r", (EARLY_EOS, 65), max_tokens=50))
    (*_, last) = run(core)["r"]
    assert (last.finish, last.stop_token_id) == (FinishReason.STOP, None)


def test_lag_keeps_one_step_in_flight(tmp_path: Path) -> None:
    core, worker = make(tmp_path, lag=1)
    core.add(request("r"))
    assert core.step().updates == ()  # submitted, not collected
    second = core.step()
    assert text(list(second.updates)) == answer(3, 1)
    assert second.stats.step_tokens == 1
    assert worker.num_states() == 1
    run(core)


def test_a_report_carries_the_steps_cost(tmp_path: Path) -> None:
    core, _ = make(tmp_path)
    core.add(request("r", (65,) * 20))
    stats = core.step().stats
    assert (stats.step_tokens, stats.running, stats.steps) == (16, 1, 1)
    assert stats.step_seconds > 0
    assert core.step().stats.step_tokens == 4
    run(core)


@BOTH_LAGS
@pytest.mark.parametrize("fault", [FAIL_SUBMIT, FAIL_RESULT])
def test_a_failed_step_ends_its_requests_and_no_others(tmp_path: Path, lag: int, fault: int) -> None:
    core, worker = make(tmp_path, lag)
    core.add(request("bad", (fault, 65)))
    core.add(request("beside", (65,) * 3))
    first = run(core)
    assert {name: updates[-1].finish for name, updates in first.items()} == dict.fromkeys(
        ("bad", "beside"), FinishReason.ERROR
    )
    assert "scripted failure" in (first["bad"][-1].error or "")
    core.add(request("later"))
    assert text(run(core)["later"]) == answer(3, 5)
    assert worker.num_states() == 0


def test_a_step_that_can_not_be_submitted_waits_for_the_one_in_flight(tmp_path: Path) -> None:
    core, _ = make(tmp_path, lag=1)
    core.add(request("beside"))
    assert core.step().updates == ()
    core.add(request("bad", (FAIL_SUBMIT, 65)))
    token, *ended = core.step().updates
    assert (token.request_id, token.finish, text([token])) == ("beside", None, answer(3, 1))
    assert {update.request_id: update.finish for update in ended} == dict.fromkeys(
        ("beside", "bad"), FinishReason.ERROR
    )
    run(core)


@BOTH_LAGS
def test_an_error_of_one_request_ends_that_request_alone(tmp_path: Path, lag: int) -> None:
    core, _ = make(tmp_path, lag)
    core.add(request("bad", (FAIL_REQUEST, 65)))
    core.add(request("good"))
    news = run(core)
    assert news["bad"][-1].finish is FinishReason.ERROR
    assert text(news["good"]) == answer(3, 5)


@BOTH_LAGS
def test_three_failed_steps_in_a_row_end_the_engine(tmp_path: Path, lag: int) -> None:
    core, _ = make(tmp_path, lag)
    for name in "ab":
        core.add(request(name, (FAIL_RESULT,)))
        assert run(core)[name][-1].finish is FinishReason.ERROR
    core.add(request("good"))
    run(core)  # a good step starts the count afresh
    for name in "cd":
        core.add(request(name, (FAIL_SUBMIT,)))
        run(core)
    core.add(request("e", (FAIL_SUBMIT,)))
    with pytest.raises(EngineDead, match=r"3 steps in a row failed.*scripted failure of submit"):
        run(core)


@BOTH_LAGS
@pytest.mark.parametrize("moment", ["submit", "result"])
def test_a_worker_that_knows_its_device_is_dead_ends_the_engine_at_once(
    tmp_path: Path, lag: int, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three more failing steps would only fail more requests, which another process could serve."""

    def die(*_: object) -> None:
        raise EngineDead("the device has failed")

    core, _ = make(tmp_path, lag)
    monkeypatch.setattr(FakeWorker if moment == "submit" else Done, moment, die)
    core.add(request("a"))
    with pytest.raises(EngineDead, match=r"^the device has failed"):
        run(core)


@BOTH_LAGS
@pytest.mark.parametrize("steps", range(6))
def test_abort_at_any_step_leaves_nothing_behind(tmp_path: Path, lag: int, steps: int) -> None:
    core, worker = make(tmp_path, lag)
    core.add(request("gone", (65,) * 40, max_tokens=40))  # three steps of prefill
    core.add(request("stays", (65,) * 5))
    for _ in range(steps):
        core.step()
    core.abort(("gone", "unknown", "gone"))
    news = run(core)
    assert text(news["stays"]) == answer(5, 5)[-len(text(news["stays"])) :]
    assert news["gone"][-1].finish is FinishReason.ABORT
    assert (worker.num_states(), core.stats().kv_blocks_used) == (0, 0)


def test_an_id_in_use_is_refused_as_an_update(tmp_path: Path) -> None:
    core, _ = make(tmp_path)
    core.add(request("r"))
    core.add(request("r"))
    errors = [update.error for update in run(core)["r"] if update.finish is FinishReason.ERROR]
    assert len(errors) == 1 and "in use" in (errors[0] or "")


def test_state_left_on_the_device_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Leaky(FakeWorker):
        def submit(self, plan: StepPlan) -> Done:
            return super().submit(replace(plan, dropped=()))

    core, _ = make(tmp_path)
    core._worker = Leaky(EngineConfig(), tmp_path, lambda phase: None)
    core.add(request("r"))
    run(core)
    assert "holds state of 1 requests" in caplog.text


class DenoisingWorker:
    """A worker over the fake device of block-causal models."""

    def __init__(self) -> None:
        self.device = BlockCausal(32, random.Random(1))

    def capacity(self) -> Capacity:
        return Capacity(32, 4, 128, VOCAB, self.device.traits)

    def prepare(self, request: Request) -> None:
        """Nothing that takes time."""

    def submit(self, plan: StepPlan) -> Done:
        output = self.device.execute(plan)
        self.device.writing.clear()
        return Done(output)

    def num_states(self) -> int:
        return len(self.device.states)

    def close(self) -> None:
        pass


def test_steps_of_denoised_sequences_do_not_run_ahead() -> None:
    """What they feed next depends on the result: with a lag, those that come later would run in steps of their own."""
    core = EngineCore(DenoisingWorker(), EngineConfig(scheduler=SchedulerConfig(max_batched_tokens=64, lag=1)))
    requests = [make_request(name, 5, 20, seed=ord(name)) for name in "ab"]
    fed = []
    for one in requests:
        core.add(one)
        fed.append(core.step().stats.step_tokens)
    assert fed[0] == 8 and fed[1] in (16, 24), "a block of each; of the first one, two where it opens its second"
    news = run(core)
    for one in requests:
        tokens = [token for update in news[one.id] for token in update.token_ids]
        assert expected(one, 128)[0][-len(tokens) :] == tokens and news[one.id][-1].finish is FinishReason.LENGTH
