"""Verifiers at one position, sampled: what they commit has the law of their formula, and stands as often as that says.

Chi-square against the predicted law, a binomial test of acceptance, and the total variation within 3 times the noise.
N is 200,000 of each verifier and kind of draft; 4,000 for vocabularies of other sizes than 8, except under `--full`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.protocols import Delta, Dense
from engine.registry import VERIFIERS, resolve
from tests.enumeration import KNOBS, made
from tests.laws import REFUSED, committed, dirichlet, many, noise, p_value, rate_p_value, total_variation

HEAD = 0.45  # what diversed's head says


def accepted_mass(name: str, p: Tensor, q: Tensor, g: Tensor, bar: Tensor) -> Tensor:
    """How much of each token may stand, of a proposal law g; the laws are [vocabulary]. `bar`: where the rule holds."""
    if name == "strict":
        return p * g
    if name in ("rejection", "block"):
        return torch.minimum(p, g)
    if name == "lenient":
        return torch.minimum(p / 0.5, g)
    if name in ("typical", "top_k_gap"):
        return torch.where(bar, g, torch.minimum(p, g))
    weight = {"ensemble": 0.6, "diversed": HEAD}.get(name, 1 - min(0.15 / total_variation(p, q), 1))
    mixture = weight * p + (1 - weight) * q
    if torch.equal(g, q):
        return torch.minimum(mixture, g)
    mixture = torch.minimum(p + 0.15, q) if name == "bounded" else mixture
    return torch.minimum(torch.maximum(p, mixture), g)


def predicted(name: str, p: Tensor, q: Tensor, g: Tensor) -> tuple[Tensor, float]:
    """The law of what is committed, and the chance that the draft stands."""
    bar = p > min(0.3, 0.4 * float(torch.exp(-torch.special.entr(p).sum())))
    if name == "top_k_gap":
        bar = (p >= p.sort(descending=True).values[1]) & (p.log() >= p.max().log() - 0.8)
    mass = accepted_mass(name, p, q, g, bar)
    if name == "strict":
        return p, float(mass.sum())
    rest = (p - mass).clamp(min=0)
    return mass + (1 - mass.sum()) * rest / rest.sum().clamp(min=1e-300), float(mass.sum())


@pytest.mark.parametrize("name", VERIFIERS)
@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("concentration", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("size", [2, 8, 1000])
def test_one_position(name: str, drawn: bool, concentration: float, size: int, full: bool) -> None:
    log_p, log_q = dirichlet(2, size, concentration, seed=size)
    p, q = log_p.double().exp(), log_q.exp().double()
    n, part = 200_000, 4000 if size == 1000 else 50_000
    if not full and size != 8:
        n = 4000
    likely = int(q.argmax())
    one_hot = torch.nn.functional.one_hot(torch.tensor(likely), size).double()
    law, rate = predicted(name, p, q, q if drawn else one_hot)
    counts, stood = torch.zeros(size, dtype=torch.int64), 0
    for start in range(0, n, part):
        rows = min(part, n)
        drafted = many(q, rows, start + 9) if drawn else torch.full((rows,), likely)
        proposal_law = Dense(log_q.exp().expand(rows, 1, size)) if drawn else Delta()
        marginal = log_q.exp()[likely].expand(rows, 1)
        tokens, stands = committed(
            made(name), log_p, proposal_law, drafted, start + 1, KNOBS.get(name, {}), marginal, HEAD
        )
        counts += tokens.bincount(minlength=size)
        stood += int(stands.sum())
    assert counts.sum() == n and p_value(counts.tolist(), law.tolist()) > REFUSED
    assert rate_p_value(stood, n, rate) > REFUSED, (stood / n, rate)
    # Of two cells it is one normal number, which is 3 times as large as its mean once in 60 times.
    assert total_variation(counts / n, law) <= (3 if size > 2 else 6) * noise(law, n)


@pytest.mark.parametrize("name", VERIFIERS)
def test_every_verifier_says_what_it_is(name: str) -> None:
    verifier = made(name)
    assert type(verifier) is resolve(VERIFIERS, name, "verifier")
    card = verifier.card
    assert card.name == name and card.lossless == (name in ("strict", "rejection", "block"))
    assert card.exact == verifier.trees == (name == "strict") and card.drawn == verifier.needs_laws == (
        name != "strict"
    )
    assert verifier.needs_marginal == (name in ("ensemble", "diversed", "bounded"))
    assert verifier.needs_states == (name == "diversed")
    assert {knob.name for knob in card.knobs} == set(KNOBS.get(name, {}))
    for knob in card.knobs:
        assert knob.problem(int(knob.default) if knob.whole else knob.default) is None
    neutral = {knob.name: knob.neutral for knob in card.knobs if knob.neutral is not None}
    assert card.lossless or bool(neutral) == (name not in ("typical", "top_k_gap"))
    assert card.bound(neutral) == (0.0 if neutral or card.lossless else 1.0)
