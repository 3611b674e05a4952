"""What a head is trained for, as a function of its weights at verified positions.

A drafted token x that was chosen stands with the mass a = max(p, w p + (1 - w) q), and a = 0 where p = 0; what is
emitted has the law v: a at x, and p (1 - a) / (1 - p) elsewhere (the scalar ensemble; `engine.verifiers.ensemble`).
So log v of what was emitted is log a where x stood, and log(1 - a) plus a constant where it fell.

loss = - policy + distill * mean KL(v, p) - lambda * mean a + floor term
policy = mean over positions of min(r A, clip(r, 1 - c, 1 + c) A), with r = v / v_then of what was emitted and
    A = R - b of its answer. At the weights of the roll-out that is the gradient of mean A log v (REINFORCE).
KL(v, p) = a log(a / p) + (1 - a) log((1 - a) / (1 - p)), in nats.

lambda > 0 is the price of a rejection: raising it raises a. Without a reward (`--reward none`), policy is 0 and the
head is distilled: the least mean KL(v, p), which is the log-likelihood ratio that tells the two apart, at a mean
acceptance. A head that saw p and q would end at logit a = logit p + lambda / distill, within [p, q]: relaxed where the
target finds the token plausible, too, and not where the draft is sure and the target is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.verifier.batch import Positions

_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Goals:
    """What counts, and how much. `floor`: of the mean entropy of w, in nats (at most 0.69)."""

    reward: float = 1.0
    distill: float = 0.0
    floor: float = 0.1
    floor_cost: float = 1.0
    clip: float = 0.2
    min_weight: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Means over positions, with gradients: acceptance, KL(v, p) and entropy of w in nats, bias a - p, w itself."""

    acceptance: Tensor
    kl: Tensor
    entropy: Tensor
    bias: Tensor
    weight: Tensor
    log_v: Tensor  # [N], but for a constant where the token fell


def mass(weight: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """a [N] float64: the probability with which the drafted token stands."""
    blend = weight.double() * p + (1 - weight.double()) * q
    return torch.where(p > 0, torch.maximum(p, blend), 0.0)


def parts(weight: Tensor, positions: Positions, min_weight: float = 0.0) -> Parts:
    """`weight` [N] is what the head says; under `min_weight` that counts in its place, with the gradient passed on."""
    bounded = weight + (weight.clamp(min=min_weight) - weight).detach()
    p, q = positions.p, positions.q
    a = mass(bounded, p, q)
    kl = _term(a, p) + _term(1 - a, 1 - p)
    log_v = torch.where(positions.stood, a, 1 - a).clamp(min=_TINY).log()
    wide = weight.double().clamp(1e-6, 1 - 1e-6)
    entropy = -(wide * wide.log() + (1 - wide) * (1 - wide).log())
    return Parts(a.mean(), kl.mean(), entropy.mean(), (a - p).mean(), bounded.double().mean(), log_v)


def loss(found: Parts, then: Tensor, advantage: Tensor, price: float, goals: Goals) -> Tensor:
    """The loss. `then` [N]: log v at the roll-out; `advantage` [N]; `price`: lambda, never negative."""
    assert price >= 0, "a negative price would pay for rejections"
    ratio = (found.log_v - then).exp()
    clipped = ratio.clamp(1 - goals.clip, 1 + goals.clip)
    policy = torch.minimum(ratio * advantage, clipped * advantage).mean()
    short = (goals.floor - found.entropy).clamp(min=0)
    return -goals.reward * policy + goals.distill * found.kl - price * found.acceptance + goals.floor_cost * short


def _term(v: Tensor, p: Tensor) -> Tensor:
    """v log(v / p), 0 where v is."""
    return torch.where(v > _TINY, v * (v.clamp(min=_TINY).log() - p.clamp(min=_TINY).log()), 0.0)
