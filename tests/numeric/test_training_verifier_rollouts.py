"""Roll-outs with tiny models: what is recorded is what happened, and the command leaves a head that can be served."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch

from engine.config import DraftConfig, EngineConfig, KVConfig, ModelConfig, ParallelConfig, SchedulerConfig
from engine.errors import ConfigError
from engine.llm import LLM, configure
from engine.protocols import DraftAsk, DraftProposal, Scalar, TargetRows
from engine.types import SamplingParams, SpeculationParams
from tests.tiny import save_tiny, tiny_config
from tests.tiny_drafts import tiny_spec, tiny_tensors
from training import train_verifier
from training.checkpoint import save_zlab
from training.tasks.loading import load
from training.tasks.task import Task
from training.verifier.batch import Positions
from training.verifier.objective import mass
from training.verifier.probe import Probe
from training.verifier.record import RecordingVerifier, WatchedDrafter
from training.verifier.rollouts import HeadSlot, Rollouts, Sampling


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec, folder = tiny_spec(tiny_config("llama")), tmp_path_factory.mktemp("draft")
    save_zlab(folder, spec, tiny_tensors(spec), {"num_target_layers": 4})
    return folder


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "letters.jsonl"
    lines = (json.dumps({"prompt": f"letter {i}", "reference": "1"}) for i in range(40))
    path.write_text("\n".join(lines))
    return path


def rollouts(
    target: Path, draft: Path, task: Task, sampling: Sampling, start: float = 0.5, spread: float = 0.2
) -> Rollouts:
    config = EngineConfig(
        model=ModelConfig(str(target), quant="none", pipeline="speculative", draft=DraftConfig("dflash", str(draft))),
        kv=KVConfig(memory="16MiB"),
        scheduler=SchedulerConfig(max_num_seqs=16),
        parallel=ParallelConfig(threads=1),
    )
    slot = HeadSlot()
    made = Rollouts(config, target, task, sampling, slot)
    torch.manual_seed(0)
    slot.head = probe = Probe(made.worker.draft_width, made.worker.target_width, made.worker.places, start)
    probe.scale.fill_(1.0)
    torch.nn.init.normal_(probe.direction, std=spread)  # so that weights are all over the place
    return made


def test_what_is_recorded_is_what_happened(target: Path, draft: Path, task_file: Path) -> None:
    task = load(str(task_file), max_tokens=24)
    sampling = Sampling(prompts=8, samples=3, temperature=1.0)
    made = rollouts(target, draft, task, sampling)
    batches = [made(number) for number in range(4)]
    assert made.worker.places == 5
    expected, got, spread, weights = 0.0, 0.0, 0.0, []
    for batch in batches:
        found = batch.positions
        assert batch.rewards.shape == batch.prompts.shape == (24,) and batch.tokens > 300
        assert bool((found.place >= 0).all()) and int(found.place.max()) <= 4
        assert batch.prompts.view(8, 3).unique(dim=1).shape[1] == 1, "each prompt is asked three times in a row"
        # Every answer starts with one plain token; each later one is a drafted one that stood or ends a round.
        stood = torch.zeros(24).index_add_(0, found.sequence, found.stood.float())
        assert bool((stood < 24).all()) and float(stood.sum()) < batch.tokens
        head = made.worker.recorder._inner._head
        assert isinstance(head, HeadSlot) and isinstance(head.head, Probe)
        with torch.no_grad():
            w = head.head(found.hidden, found.states, found.place)
        weights.append(w)
        a = mass(w, found.p, found.q)
        expected, got = expected + float(a.sum()), got + float(found.stood.sum())
        spread += float((a * (1 - a)).sum())
    assert torch.cat(weights).std() > 0.1
    # As often as the recorded p, q and states say, to within what chance allows; seeds are fixed.
    assert abs(got - expected) < 4 * spread**0.5
    strict = sum(float(batch.positions.p.sum()) for batch in batches)
    assert abs(got - strict) > 6 * spread**0.5, "the test could not tell it from the target's own law"
    again = rollouts(target, draft, task, sampling)(1)
    assert torch.equal(again.rewards, batches[1].rewards) and torch.equal(again.prompts, batches[1].prompts)
    torch.testing.assert_close(again.positions.p, batches[1].positions.p, atol=1e-5, rtol=1e-3)
    made.close()


class Fixed:
    """See `protocols.Chance`."""

    def __init__(self, coins: torch.Tensor) -> None:
        self._coins = coins

    def uniforms(self) -> torch.Tensor:
        return self._coins

    def draw(self, log_weights: torch.Tensor, drafts: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        return log_weights.argmax(1)


class Asked:
    """The last question that a drafter was asked."""

    most, scores = 4, True

    def __init__(self, asks: list[DraftAsk]) -> None:
        self.asks = asks


def test_a_record_holds_what_the_verifier_decided_by() -> None:
    """The bias that the verifier reports, a - p, from the record alone; for every position up to a rejected one."""
    generator = torch.Generator().manual_seed(0)
    n, k, vocabulary, width = 12, 4, 9, 6
    probe = Probe(width, width, k, 0.5)
    probe.scale.fill_(1.0)
    torch.nn.init.normal_(probe.direction, generator=generator)
    torch.nn.init.normal_(probe.bias, generator=generator)
    lengths = tuple(int(length) for length in torch.randint(0, k + 1, (n,), generator=generator))
    tokens = torch.randint(vocabulary, (n, k), generator=generator)
    tokens[torch.arange(k) >= torch.tensor(lengths)[:, None]] = -1
    proposal = DraftProposal(
        tokens=tokens,
        lengths=lengths,
        marginal=Scalar(torch.rand(n, k, generator=generator)),
        hidden=torch.randn(n, k, width, generator=generator),
    )
    target = TargetRows(
        draws=torch.zeros(n, k + 1, dtype=torch.int64),
        log_probs=torch.randn(n, k + 1, vocabulary, generator=generator).log_softmax(2),
        chance=Fixed(torch.rand(n, k, generator=generator, dtype=torch.float64) * 0.6),
        knobs={"min_weight": torch.zeros(n, 1, dtype=torch.float64)[:, 0]},
        greedy=torch.zeros(n, dtype=torch.bool),
        states=torch.randn(n, k + 1, width, generator=generator),
    )
    asks = [DraftAsk(f"r{i}", k, 10 * i) for i in range(n)]
    recorder = RecordingVerifier(probe, cast(WatchedDrafter, Asked(asks)))
    verdict = recorder.verify(proposal, target)
    found, decided, rounds = recorder.take()
    assert found is not None and verdict.bias is not None
    reached = [(i, j) for i in range(n) for j in range(min(int(verdict.accepted[i]) + 1, lengths[i]))]
    assert decided == [(f"r{i}", 10 * i + 1 + j) for i, j in reached]
    assert rounds == sum(length > 0 for length in lengths) and 10 < len(found) < sum(lengths)
    assert found.stood.tolist() == [j < int(verdict.accepted[i]) for i, j in reached]
    with torch.no_grad():
        a = mass(probe(found.hidden, found.states, found.place), found.p, found.q)
    reported = torch.stack([verdict.bias[i, j] for i, j in reached]).double()
    assert float(reported.max()) > 0.1
    torch.testing.assert_close(a - found.p, reported, atol=1e-5, rtol=1e-4)
    assert recorder.take() == (None, [], 0)


def test_positions_behind_the_end_of_an_answer_are_left_out(
    target: Path, draft: Path, task_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop string may end an answer inside an accepted draft: what came behind it earned nothing."""
    task = replace(
        load(str(task_file), max_tokens=40), stop=tuple("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    )
    made = rollouts(target, draft, task, Sampling(prompts=8, samples=4, temperature=0.5), 0.01, 0.0)
    raw: list[tuple[str, int]] = []
    taken = made.worker.recorder.take

    def take() -> tuple[Positions | None, list[tuple[str, int]], int]:
        found, tokens, rounds = taken()
        raw.extend(tokens)
        return found, tokens, rounds

    monkeypatch.setattr(made.worker.recorder, "take", take)
    batch = made(0)
    kept = torch.bincount(batch.positions.sequence, minlength=32)
    assert 0 < len(batch.positions) < len(raw)
    # Each position decides a token behind the first one, the one that ended the answer among them.
    assert int(kept.sum()) <= batch.tokens


@pytest.mark.parametrize("reward", ["task", "none"])
def test_from_a_task_to_a_head_that_is_served(
    target: Path, draft: Path, task_file: Path, tmp_path: Path, reward: str
) -> None:
    output = tmp_path / "head"
    arguments = [
        *(str(output), "--model", str(target), "--draft", str(draft), "--task", str(task_file), "--score", "contains"),
        *("--reward", reward, "--prompts", "4", "--samples", "2", "--updates", "2", "--max-tokens", "10"),
        *("--temperature", "4", "--threads", "1", "--memory", "16MiB", "--target-acceptance", "0.5"),
    ]
    assert train_verifier.main(arguments) == 0
    assert {path.name for path in output.iterdir()} == {
        *("README.md", "config.json", "curves.png", "model.safetensors", "training", "training.json")
    }
    card = (output / "README.md").read_text()
    assert "letters" in card and "steered to an acceptance of 0.5" in card
    assert len(json.loads((output / "training.json").read_text())["points"]) == 2
    draft_config = {"drafter": "dflash", "path": str(draft), "adaptive": False}
    verifier = {"name": "diversed", "head": str(output), "knobs": {"min_weight": 0.2}}
    settings = {"path": str(target), "quant": "none", "threads": 1, "memory": "16MiB", "pipeline": "speculative"}
    with LLM(config=configure({**settings, "draft": draft_config, "verifier": verifier})) as llm:
        params = SamplingParams(max_tokens=20, temperature=4.0)
        (answer,) = llm.generate("letter", params, SpeculationParams(report=True))
        assert answer.speculation is not None
        assert answer.speculation.verifier == "diversed" and answer.speculation.bias_bound == pytest.approx(0.8)
        assert 0 < answer.speculation.bias < 20


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--temperature", "0"), "--temperature must be between"),
        (("--price", "-1"), "--price .* pay for rejections"),
        (("--target-acceptance", "1"), "--target-acceptance"),
        (("--task", "poems"), "no task of that name"),
        (("--score", "code"), "nothing to be scored with"),
    ],
)
def test_wrong_options_are_named(
    target: Path, draft: Path, task_file: Path, tmp_path: Path, extra: tuple[str, str], words: str
) -> None:
    known = (str(tmp_path), "--model", str(target), "--draft", str(draft), "--task", str(task_file))
    with pytest.raises(ConfigError, match=words):
        train_verifier.main([*known, *extra])
