"""Batches of padded drafts with coins as pipelines draw them, for tests that compare one verdict with another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from engine.pipelines.coins import Coins
from engine.protocols import Delta, Dense, DraftProposal, Rows, Scalar, TargetRows, Verdict
from engine.registry import VERIFIERS
from tests.enumeration import Knobs, made
from tests.laws import dirichlet, draw_rows, states

NEVER = float("-inf")
CPU = torch.device("cpu")
WEIGHING = [name for name in VERIFIERS if name != "strict"]
LOOSEST: dict[str, Knobs] = {
    "ensemble": {"target_weight": 0.0},
    "diversed": {"min_weight": 0.0},
    "bounded": {"epsilon": 1.0},
    "lenient": {"lenience": 0.01},
    "typical": {"posterior_threshold": 0.0, "posterior_alpha": 0.0},
    "top_k_gap": {"relaxed_topk": 1000.0, "relaxed_delta": 100.0},
}


def batch(n: int, width: int, size: int, seed: int, failing: float = 0.0) -> tuple[Tensor, TargetRows]:
    """Padded drafts [n, width] and what the target says of them; some rows are no numbers."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = dirichlet(n * (width + 1), size, 0.5, seed).view(n, width + 1, size)
    lengths = torch.randint(0, width + 1, (n, 1), generator=generator)
    steps = torch.arange(width + 1)
    log_probs[torch.rand(n, width + 1, generator=generator) < failing] = float("nan")
    log_probs[steps > lengths] = NEVER
    dead = log_probs.isnan().any(-1) | (steps > lengths)
    draws = draw_rows(log_probs.nan_to_num(0.0).flatten(0, 1), generator).view(n, width + 1).masked_fill(dead, -1)
    tokens = torch.randint(0, size, (n, width), generator=generator)
    likely = log_probs[:, :width].nan_to_num(0.0).argmax(-1)
    tokens = torch.where(torch.rand(n, width, generator=generator) < 0.7, likely, tokens)
    states_ = torch.zeros(n, width + 1, 4)
    return tokens.masked_fill(steps[:width] >= lengths, -1), TargetRows(draws, log_probs, states=states_)


def drawn_laws(tokens: Tensor, size: int, seed: int = 5) -> Dense:
    return Dense(dirichlet(tokens.numel(), size, 1.0, seed).exp().view(*tokens.shape, size))


def one_hot(tokens: Tensor, size: int) -> Dense:
    return Dense(torch.nn.functional.one_hot(tokens.clamp(min=0), size).float())


def verified(
    name: str,
    law: Delta | Dense,
    tokens: Tensor,
    target: TargetRows,
    knobs: Mapping[str, float] | None = None,
    marginal: Tensor | None = None,
    said: float = 0.5,
) -> Verdict:
    n, width = tokens.shape
    values = {name: torch.full((n,), value, dtype=torch.float64) for name, value in (knobs or {}).items()}
    target = replace(target, chance=Coins(states(n), width, CPU), knobs=values)
    thought = torch.full((n, width), 0.9) if marginal is None else marginal
    scores = Scalar(thought) if thought.dim() == 2 else Rows(thought)
    hidden = torch.full((n, width, 1), said)
    proposal = DraftProposal(tokens, tuple((tokens >= 0).sum(1).tolist()), law, scores, hidden)
    return made(name).verify(proposal, target)


def same(a: Verdict, b: Verdict) -> bool:
    pairs_ = ((a.accepted, b.accepted), (a.path, b.path), (a.next_token, b.next_token))
    return all(torch.equal(here, there) for here, there in pairs_)
