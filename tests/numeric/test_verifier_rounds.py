"""Rounds upon rounds, with the coins that pipelines use: no coin that has decided anything may be met again.

Two tokens, each of them as likely, whatever stands before them; drafts of two tokens that mostly say the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import pytest
import torch
from torch import Tensor

from engine.pipelines import coins as coins_module
from engine.pipelines.coins import Coins
from engine.protocols import Dense, DraftProposal, TargetRows, Verifier
from engine.runtime.rng import Draw, Purpose, uniform_rows
from engine.runtime.sampler import SamplingState
from engine.verifiers.block import BlockVerifier
from engine.verifiers.rejection import RejectionVerifier
from tests.laws import REFUSED, p_value

P, Q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
WIDTH, LENGTH, N = 2, 5, 4000


@dataclass(frozen=True)
class At:
    """What `Coins` asks of a request's state."""

    seed: int
    position: int

    def draw(self, purpose: Purpose) -> Draw:
        return Draw(self.seed, 0, self.position, purpose)


def write(verifier: Verifier) -> Tensor:
    """N answers of LENGTH tokens; drafts and the target's own draws are random, coins are functions."""
    generator = torch.Generator().manual_seed(1)
    text, position = torch.zeros(N, LENGTH + WIDTH + 1, dtype=torch.int64), torch.zeros(N, dtype=torch.int64)
    open_ = torch.arange(N)
    while len(open_):
        n = len(open_)
        tokens = torch.multinomial(Q, n * WIDTH, True, generator=generator).view(n, WIDTH)
        draws = torch.multinomial(P, n * (WIDTH + 1), True, generator=generator).view(n, WIDTH + 1)
        states = [At(*each) for each in zip(open_.tolist(), position[open_].tolist(), strict=True)]
        coins = Coins(cast(Sequence[SamplingState], states), WIDTH, P.device)
        rows = TargetRows(draws, P.log().expand(n, WIDTH + 1, 2), coins)
        verdict = verifier.verify(DraftProposal(tokens, (WIDTH,) * n, Dense(Q.expand(n, WIDTH, 2))), rows)
        accepted = verdict.accepted.unsqueeze(1)
        written = torch.cat((tokens, draws[:, :1]), 1).scatter(1, accepted, verdict.next_token.unsqueeze(1))
        for step in range(WIDTH + 1):  # what stands behind the replaced token is written over by the next round
            text[open_, position[open_] + step] = written[:, step]
        position[open_] += verdict.accepted + 1
        open_ = open_[position[open_] < LENGTH]
    return text[:, :LENGTH]


def by_position_alone(draws: Sequence[Draw], n: int, device: torch.device) -> Tensor:
    """The coins that a position had if its place in the draft were not in their key."""
    moved = [[draw._replace(position=draw.position + step) for draw in draws] for step in range(n)]
    return torch.cat([uniform_rows(column, 1, device) for column in moved], 1)


def value(verifier: Verifier) -> float:
    """The p-value of all 32 answers being as likely as each other."""
    places = 2 ** torch.arange(LENGTH)
    counts = (write(verifier) * places).sum(1).bincount(minlength=2**LENGTH)
    found = p_value(counts.tolist(), [2.0**-LENGTH] * 2**LENGTH)
    print(f"p = {found:.3g}")  # noqa: T201
    return found


@pytest.mark.parametrize("verifier", [RejectionVerifier(), BlockVerifier()], ids=lambda verifier: verifier.card.name)
@pytest.mark.parametrize("key", [uniform_rows, by_position_alone], ids=["place", "position"])
def test_coins_are_met_once(verifier: Verifier, key: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Block verification looks at coins behind the end of a prefix. Token by token, nobody does: either key is fair."""
    monkeypatch.setattr(coins_module, "uniform_rows", key)
    planted = isinstance(verifier, BlockVerifier) and key is by_position_alone
    assert (value(verifier) < REFUSED) == planted
