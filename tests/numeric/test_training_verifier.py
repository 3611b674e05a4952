"""Training of verifier heads: the signs of the objective, what it converges to, and runs that are killed and go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError
from training.verifier.batch import Batch, Positions, join
from training.verifier.objective import Goals, Parts, loss, mass, parts
from training.verifier.probe import Probe
from training.verifier.trainer import Point, Schedule, Trainer

WIDTH = 6


def positions(p: Tensor, q: Tensor, stood: Tensor, hidden: Tensor | None = None) -> Positions:
    size = len(p)
    inputs = torch.zeros(size, WIDTH) if hidden is None else hidden
    zeros = torch.zeros(size, dtype=torch.int64)
    return Positions(inputs, torch.zeros(size, 2), zeros, p.double(), q.double(), stood, zeros)


def random_positions(seed: int = 0, size: int = 200) -> Positions:
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.rand(2, size, generator=generator)
    return positions(p, q, torch.rand(size, generator=generator) < 0.5, torch.randn(size, WIDTH, generator=generator))


# ---- the objective ---------------------------------------------------------------------------------------


def test_the_mass_of_a_drafted_token_is_that_of_the_scalar_ensemble() -> None:
    p, q = torch.tensor([0.2, 0.6, 0.0, 0.5]).double(), torch.tensor([0.8, 0.1, 0.9, 0.5]).double()
    a = mass(torch.tensor([0.75, 0.0, 0.0, 0.3]), p, q)
    assert a.tolist() == pytest.approx([0.35, 0.6, 0.0, 0.5])


def test_the_gradient_is_that_of_the_expected_reward() -> None:
    """All outcomes of one position, weighed by their chances: mean A dlog v = dE[R]/dw, by finite differences."""
    p, q, weight = 0.3, 0.9, 0.6
    for rewards in ((1.0, 0.0), (0.2, 0.7)):  # stood, fell
        found = positions(torch.tensor([p, p]), torch.tensor([q, q]), torch.tensor([True, False]))
        w = torch.tensor([weight, weight], dtype=torch.float64, requires_grad=True)
        now = parts(w, found)
        a = mass(torch.tensor(weight), torch.tensor(p).double(), torch.tensor(q).double())
        chance = torch.stack((a, 1 - a))
        advantage = torch.tensor(rewards, dtype=torch.float64) - 0.4
        goals = Goals(reward=1.0, floor=0.0)
        loss(now, now.log_v.detach(), 2 * chance * advantage, 0.0, goals).backward()
        step = 1e-6
        expected = [
            float(value * rewards[0] + (1 - value) * rewards[1])
            for value in (
                mass(torch.tensor(weight + s, dtype=torch.float64), found.p[:1], found.q[:1]) for s in (-step, step)
            )
        ]
        assert w.grad is not None
        assert -float(w.grad.sum()) == pytest.approx((expected[1] - expected[0]) / (2 * step), rel=1e-3)


def _slope(goals: Goals, price: float, advantage: float) -> float:
    """d loss / d bias at w = 0.6: above 0, a step of training lowers w."""
    found = random_positions()
    bias = torch.tensor(0.4, requires_grad=True)
    now = parts(bias.sigmoid().expand(len(found)), found)
    sign = torch.where(found.stood, -1.0, 1.0).double()  # the answers that the target's own tokens went into are better
    loss(now, now.log_v.detach(), advantage * sign, price, goals).backward()
    assert bias.grad is not None
    return float(bias.grad)


def test_the_signs_of_the_terms() -> None:
    only_reward, only_price = Goals(reward=1.0, floor=0.0), Goals(reward=0.0, floor=0.0)
    assert _slope(only_reward, 0.0, 1.0) < 0, "a reward for strict tokens raises w"
    assert _slope(only_reward, 0.0, -1.0) > 0, "a reward for drafted ones lowers it"
    assert _slope(only_price, 0.5, 0.0) > 0, "a price of rejections lowers w, whatever the reward"
    assert _slope(only_reward, 0.5, 1.0) > _slope(only_reward, 0.1, 1.0), "and more so when it is raised"
    assert _slope(Goals(reward=0.0, distill=1.0, floor=0.0), 0.0, 0.0) < 0, "divergence from the target raises w"
    confident = Goals(reward=0.0, floor=0.69)
    assert _slope(confident, 0.0, 0.0) > 0, "too little entropy at w = 0.6 leads back to a half"
    with pytest.raises(AssertionError):
        _slope(only_price, -0.1, 0.0)


def test_the_divergence_is_that_of_the_emitted_law() -> None:
    p = torch.tensor([0.2, 0.05, 0.75])
    a = 0.6
    law = torch.tensor([a, 0.05 * (1 - a) / 0.8, 0.75 * (1 - a) / 0.8])
    found = positions(p[:1], torch.tensor([1.0]), torch.tensor([True]))
    now = parts(torch.tensor([0.5]), found)
    assert float(now.acceptance) == pytest.approx(a) and float(now.bias) == pytest.approx(0.4)
    assert float(now.kl) == pytest.approx(float((law * (law / p).log()).sum()), rel=1e-5)
    same = parts(torch.ones(200), random_positions())
    assert float(same.kl) == float(same.bias) == 0


def test_without_a_reward_the_best_mass_is_tilted_by_the_price() -> None:
    found = positions(torch.tensor([0.1, 0.4, 0.4, 0.7]), torch.tensor([0.95, 0.95, 0.45, 0.3]), torch.ones(4).bool())
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(800):
        now = parts(logits.sigmoid(), found)
        optimizer.zero_grad()
        loss(now, now.log_v.detach(), torch.zeros(4), 1.5, Goals(reward=0.0, distill=1.0, floor=0.0)).backward()
        optimizer.step()
    a = mass(logits.detach().sigmoid(), found.p, found.q)
    wanted = torch.minimum(torch.maximum((found.p.logit() + 1.5).sigmoid(), found.p), torch.maximum(found.p, found.q))
    torch.testing.assert_close(a, wanted, atol=5e-3, rtol=0)


def test_a_weight_under_the_least_counts_as_that_and_still_learns() -> None:
    found = random_positions()
    weight = torch.full((200,), 0.2, requires_grad=True)
    now: Parts = parts(weight, found, 0.5)
    assert now.weight.item() == pytest.approx(0.5)
    assert now.bias.item() == pytest.approx(parts(torch.full((200,), 0.5), found).bias.item())
    now.acceptance.backward()
    assert weight.grad is not None and bool((weight.grad[found.q > found.p] < 0).all())


# ---- training --------------------------------------------------------------------------------------------


class Planted:
    """Answers of six drafts: it costs reward if a drafted token stands where feature 2 is above 1, and only there."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def __call__(self, number: int) -> Batch:
        generator = torch.Generator().manual_seed(number)
        answers, each = 64, 6
        hidden = torch.randn(answers * each, WIDTH, generator=generator) * 2 + 1
        harm = hidden[:, 2] > 1
        p, q = torch.full((2, answers * each), 0.25).double()
        q = q + 0.6
        states, place = torch.randn(answers * each, 2, generator=generator), torch.arange(each).repeat(answers)
        with torch.no_grad():
            a = mass(self.probe(hidden, states, place), p, q)
        stood = torch.rand(answers * each, generator=generator) < a
        spoiled = (stood & harm).view(answers, each).sum(1).clamp(max=3)
        rewards = 1 - spoiled.double() / 3
        sequence = torch.arange(answers).repeat_interleave(each)
        found = Positions(hidden, states, place, p, q, stood, sequence)
        return Batch(found, rewards, sequence[::each] // 4, 100, answers)


def run(folder: Path, updates: int, price: float = 0.08, **changes: float) -> tuple[Probe, list[Point]]:
    torch.manual_seed(0)
    probe = Probe(WIDTH, 2, 6, 0.7)
    schedule = Schedule(updates, lr=0.03, price=price, **changes)  # type: ignore[arg-type]
    trainer = Trainer(probe, Planted(probe), schedule, Goals(floor=0.05), folder)
    trainer.run(lambda _: None)
    return probe, trainer.points


def test_a_head_learns_where_relaxing_hurts(tmp_path: Path) -> None:
    probe, points = run(tmp_path, 40)
    batch = Planted(probe)(1000)
    found = batch.positions
    with torch.no_grad():
        weight = probe(found.hidden, found.states, found.place)
    harm = found.hidden[:, 2] > 1
    assert float(weight[harm].mean()) > 0.85 and float(weight[~harm].mean()) < 0.45
    first, last = points[0], points[-1]
    assert last.reward > first.reward + 0.1 and last.acceptance > first.acceptance + 0.02
    assert int(probe.direction.abs().argmax()) == 2


def test_a_higher_price_of_rejections_buys_acceptance(tmp_path: Path) -> None:
    cheap, dear = run(tmp_path / "cheap", 12, 0.01)[1], run(tmp_path / "dear", 12, 0.6)[1]
    assert dear[-1].acceptance > cheap[-1].acceptance + 0.1
    assert dear[-1].reward < cheap[-1].reward


def test_the_price_is_steered_to_an_acceptance(tmp_path: Path) -> None:
    """Strict is 0.25, the draft alone 0.85."""
    for target in (0.4, 0.6):
        points = run(tmp_path / str(target), 60, target=target, gain=2.0)[1]
        assert sum(point.acceptance for point in points[-20:]) / 20 == pytest.approx(target, abs=0.05)


def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    whole, points = run(tmp_path / "whole", 5, target=0.5)
    run(tmp_path / "parts", 2, target=0.5)
    log = tmp_path / "parts" / "log.jsonl"
    log.write_text(log.read_text() + log.read_text().splitlines()[0] + "\n")  # killed before the state was written
    resumed, again = run(tmp_path / "parts", 5, target=0.5)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert [point.acceptance for point in again] == [point.acceptance for point in points]
    assert len([json.loads(line) for line in log.read_text().splitlines()]) == 5
    with pytest.raises(ConfigError, match="state of another head"):
        Trainer(Probe(3, 2, 6), Planted(whole), Schedule(5), Goals(), tmp_path / "parts")


def test_the_baseline_is_of_the_other_answers_to_the_same_prompt(tmp_path: Path) -> None:
    trainer = Trainer(Probe(WIDTH, 2, 6), Planted(Probe(WIDTH, 2, 6)), Schedule(1), Goals(), tmp_path)
    empty = positions(torch.zeros(1), torch.zeros(1), torch.ones(1).bool())
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0]).double()
    batch = Batch(empty, rewards, torch.tensor([7, 7, 7, 9]))
    assert trainer._advantages(batch).tolist() == [1.0, -0.5, -0.5, 0.5]  # alone: the mean of the first batch
    later = Batch(empty, torch.ones(4).double(), torch.arange(4))
    assert trainer._advantages(later).tolist() == [0.5] * 4  # the running mean, from before this batch
    assert trainer._advantages(later).tolist() == pytest.approx([1 - 0.55] * 4)


def test_positions_are_taken_and_joined() -> None:
    found = random_positions(size=10)
    both = join([found.take(found.stood), found.take(~found.stood)])
    assert len(both) == 10 and both.p.sum() == pytest.approx(found.p.sum())
    assert bool(both.stood[: int(found.stood.sum())].all())
