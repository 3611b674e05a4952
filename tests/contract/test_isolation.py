"""A failure inside one request ends that request alone, and leaves nothing behind in the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig, SchedulerConfig
from engine.core import EngineCore
from engine.runtime.worker import LocalWorker
from engine.types import FinishReason, SeqUpdate
from tests.contract.ladder import Ladder, load_worker, request
from tests.tiny import save_tiny

POISON = 99


@pytest.fixture
def poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalWorker:
    """A model whose embedding of one token is NaN, from after its start-up checks on."""
    worker = load_worker(save_tiny("qwen3", tmp_path), memory="8MiB", threads=1)
    embedding = worker._pipeline._runner.adapter.model.get_input_embeddings()  # type: ignore[attr-defined]
    monkeypatch.setattr(embedding, "weight", torch.nn.Parameter(embedding.weight.clone(), requires_grad=False))
    embedding.weight[POISON] = float("nan")
    return worker


@pytest.mark.parametrize("lag", [0, 1])
def test_nan_ends_its_own_request_only(poisoned: LocalWorker, lag: int) -> None:
    healthy = {f"ok{i}": request(f"ok{i}", [i, 5, 6, 7], 8, temperature=0.7, seed=i) for i in range(3)}
    expected = Ladder(poisoned).run(list(healthy.values()))
    core = EngineCore(poisoned, EngineConfig(scheduler=SchedulerConfig(lag=lag)), hash_seed=b"the same ladder.")
    for one in (*healthy.values(), request("bad", [1] * 20 + [POISON] * 20, 8)):
        core.add(one)
    news: dict[str, list[SeqUpdate]] = {}
    while core.has_work():
        for update in core.step().updates:
            news.setdefault(update.request_id, []).append(update)
    core.settle()
    assert [update.finish for update in news["bad"]] == [FinishReason.ERROR]
    assert "not a number" in (news["bad"][0].error or "")
    for name in healthy:
        assert [token for update in news[name] for token in update.token_ids] == expected[name].tokens
    # Its blocks hold NaN: a later request with the same beginning must compute its own.
    again = request("again", [1] * 20 + [POISON] * 20 + [3], 4)
    core.add(again)
    found = [update for _ in range(4) for update in core.step().updates]
    assert found[0].cached_tokens == 0
    assert poisoned.num_states() == core.stats().kv_blocks_used == 0


@pytest.mark.parametrize("lag", [0, 1])
def test_request_with_every_token_banned_fails_alone(poisoned: LocalWorker, lag: int) -> None:
    """Allowed ids that a bad word takes away later: nothing is left to draw."""
    core = EngineCore(poisoned, EngineConfig(scheduler=SchedulerConfig(lag=lag)), hash_seed=b"the same ladder.")
    stuck = request("stuck", [1, 2], 8, allowed_token_ids=(7,), bad_words=((7, 7),))
    core.add(stuck)
    core.add(request("fine", [1, 2], 8, temperature=0.0))
    ends: dict[str, FinishReason] = {}
    while core.has_work():
        ends |= {update.request_id: update.finish for update in core.step().updates if update.finish}
    assert ends == {"stuck": FinishReason.ERROR, "fine": FinishReason.LENGTH}
