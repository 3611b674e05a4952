"""What all verifiers that weigh laws are made of: from chances and a residual to a verdict.

p is the target's law at a drafted position, g the law that the token was really drawn from. A rule accepts a part
A <= g of that; what is committed at the position has the law A + (1 - |A|) r, r being the law of the token that
replaces a rejected one. `docs/algorithms.md` has the formulas; the papers stand in the verifiers' own files.

Drawn tokens (`Dense`) go through `mixed`, `lifted` and `drawn`, which weigh p against g. Chosen tokens (`Delta`) go
through `chosen`, which knows no law of the draft: to weigh p against the draft's opinion of a token that was not drawn
from it is the classic mistake, and here it does not type-check.

Tensors are [requests n, drafted positions k] float64 where nothing else is said; rows of laws stay float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine.protocols import Delta, Dense, DraftProposal, Rows, Scalar, TargetRows, Verdict

NEVER = float("-inf")
Law = TypeVar("Law", Delta, Dense)
# (drafts [m], steps [m]), the positions that need another token -> log-weights [m, vocabulary] float64 of its law.
Residual = Callable[[Tensor, Tensor], Tensor]
# How far a rule stretches p: from log p of tokens [n, m] and what it knows of their rows, the log of a factor >= 1.
Gain = Callable[[Tensor, Tensor], Tensor]


class Drafted(Generic[Law]):
    """Drafts of one law, and what the target says of them.

    `live` [n, k] bool: positions with a token that may stand: no padding, and the target has a law there. `log_p`: the
    target's log-probability of the token; -inf where that is 0 or the position is not live.
    """

    def __init__(self, law: Law, tokens: Tensor, target: TargetRows) -> None:
        assert target.log_probs is not None and target.chance is not None
        self.law: Law = law
        self.tokens = tokens
        self.target = target
        self.log_probs = target.log_probs
        self.coins = target.chance
        width, size = tokens.shape[1], target.log_probs.shape[2]
        self.live = (tokens >= 0) & (tokens < size) & (target.draws[:, :width] >= 0)
        log_p = at_tokens(self.log_probs[:, :width], tokens).double()
        self.log_p = log_p.where(self.live & (log_p > NEVER), NEVER)

    def where_free(self, relaxed: Tensor, strict: Tensor | float) -> Tensor:
        """`relaxed` where the verifier may leave the target's law; `strict` elsewhere, and in place of NaN."""
        sound = ~relaxed.isnan()
        return relaxed.where(sound if self.target.free is None else sound & self.target.free, strict)


def at_tokens(rows: Tensor, tokens: Tensor) -> Tensor:
    """The entries of rows [n, k, size] at tokens [n, k]; those outside of it give any entry."""
    return rows.gather(-1, tokens.clamp(0, rows.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)


def setting(target: TargetRows, name: str) -> Tensor:
    """A knob of each request, [n, 1]."""
    return target.knobs[name].double().unsqueeze(1)


def conclude(
    drafted: Drafted[Delta] | Drafted[Dense],
    accepted: Tensor,
    residual: Residual,
    bias: Tensor | None = None,
    greedy: Tensor | None = None,
) -> Verdict:
    """The verdict on chains of which `accepted` [n] int64 tokens stand.

    What follows is drawn from the residual where a token fell, and is the target's own draw after a whole draft and in
    `greedy` [n] bool requests.
    """
    tokens, draws = drafted.tokens, drafted.target.draws
    steps = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    path = torch.where(steps < accepted.unsqueeze(1), steps, -1)
    following = draws.gather(1, accepted.unsqueeze(1)).squeeze(1)
    # A row without a law (-1) keeps its -1: nothing can be drawn there.
    fell = (accepted < (tokens >= 0).sum(1)) & (following >= 0)
    drafts = (fell if greedy is None else fell & ~greedy).nonzero().squeeze(1)
    if drafts.numel():
        rows = accepted[drafts]
        following[drafts] = drafted.coins.draw(residual(drafts, rows), drafts, rows)
    return Verdict(accepted, path, following, None if bias is None else bias.where(drafted.live, 0.0).float())


def _in_order(stands: Tensor) -> Tensor:
    """How many tokens of each chain stand until the first that does not, [n] int64."""
    return stands.long().cumprod(1).sum(1)


def _lift(log_mass: Tensor, log_gain: Tensor) -> Tensor:
    """exp of the sum, and 0 where there is no mass, even if the gain is infinite."""
    return torch.where(log_mass > NEVER, (log_mass + log_gain).exp(), 0.0)


def _or_target(weights: Tensor, log_p: Tensor) -> Tensor:
    """Weights of nothing at all are replaced by p."""
    return torch.where(weights.amax(1, keepdim=True) == NEVER, log_p, weights)


# ---- chosen tokens ---------------------------------------------------------------------------------------


def own_mass(proposal: DraftProposal) -> Tensor:
    """What the draft thinks of its tokens; 0 for tokens that it does not know. Where it is NaN, no rule is in force."""
    match proposal.marginal:
        case Scalar():
            mass = proposal.marginal.probs
        case Rows():
            rows = proposal.marginal.probs
            mass = at_tokens(rows, proposal.tokens).where(proposal.tokens < rows.shape[2], 0.0)
        case None:
            raise AssertionError("this verifier goes with drafters that score their tokens")
    return mass.double()


def chosen(drafted: Drafted[Delta], wanted: Tensor | None = None) -> Verdict:
    """Tokens that were chosen, and not drawn: each stands with the mass that its verifier wants for it.

    That is never under p(x), so that rules can only relax, and 0 where p(x) is 0. A token that falls is replaced by a
    draw from p without it: the law is p with x raised to `wanted`, at a distance of wanted - p(x). None is p(x) itself.

    A greedy request keeps a token that is the likeliest of that law, and commits the target's own in place of another.
    """
    p = drafted.log_p.exp()
    mass = p if wanted is None else drafted.where_free(wanted.clamp(max=1.0).maximum(p).where(p > 0, 0.0), p)
    stands = drafted.coins.uniforms() < mass
    bias = greedy = None
    if wanted is not None:
        bias, greedy = mass - p, drafted.target.greedy
        if greedy is not None:
            kept, own = likeliest(drafted, p, mass)
            stands = torch.where(greedy.unsqueeze(1), kept, stands)
            bias = torch.where(greedy.unsqueeze(1), (kept & ~own).double(), bias)
    return conclude(drafted, _in_order(stands), without_token(drafted), bias, greedy)


def without_token(drafted: Drafted[Delta]) -> Residual:
    """p without the drafted token; p itself where that is all it has."""

    def rows(drafts: Tensor, steps: Tensor) -> Tensor:
        log_p = drafted.log_probs[drafts, steps].double()
        return _or_target(log_p.scatter(1, drafted.tokens[drafts, steps].unsqueeze(1), NEVER), log_p)

    return rows


def likeliest(drafted: Drafted[Delta], p: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Is x the likeliest token where it is raised to `mass`? Is it the target's own? Ties go to the lowest id."""
    width = drafted.tokens.shape[1]
    best = drafted.target.draws[:, :width]  # greedy: the likeliest of p
    own = drafted.live & (drafted.tokens == best)
    # All others are scaled alike, so that the best of them stays the best.
    rival = at_tokens(drafted.log_probs[:, :width], best).double().exp() * (1 - mass) / (1 - p)
    wins = (mass > rival) | ((mass == rival) & (drafted.tokens < best))
    return own | (drafted.live & (mass > p) & wins), own


# ---- drawn tokens ----------------------------------------------------------------------------------------


def drawn(
    drafted: Drafted[Dense], chances: Tensor, remainder: Residual | None = None, bias: Tensor | None = None
) -> Verdict:
    """Tokens that stand one after another by chances of their own; what falls is replaced out of `remainder`."""
    accepted = _in_order(drafted.coins.uniforms() < chances)
    return conclude(drafted, accepted, remainder or left_over(drafted.law, drafted.log_probs), bias)


def log_ratios(law: Dense, drafted: Drafted[Dense]) -> Tensor:
    """log (p / g) of the drafted tokens.

    -inf where p is 0 or the position not live, and where g is 0 or no number: its own law did not draw that token.
    """
    log_g = at_tokens(law.probs, drafted.tokens).double().log()
    possible = (drafted.tokens < law.probs.shape[2]) & (log_g > NEVER) & (drafted.log_p > NEVER)
    return torch.where(possible, drafted.log_p - log_g, NEVER)


def left_over(law: Dense, log_probs: Tensor, weight: Tensor | None = None, share: Tensor | None = None) -> Residual:
    """(weight p - (1 - share) g)+ where p > 0; by default (p - g)+. `weight` and `share` are [n, k].

    Where nothing is left (the two are equal but for rounding), or g is no number, it is p.
    """

    def rows(drafts: Tensor, steps: Tensor) -> Tensor:
        log_p = log_probs[drafts, steps].double()
        g = widened(law.probs[drafts, steps], log_p.shape[1]).double()
        scale = torch.ones_like(log_p[:, :1]) if weight is None else weight[drafts, steps].unsqueeze(1)
        left = log_p.exp() * scale
        left = left.sub_(g if share is None else g * (1 - share[drafts, steps].unsqueeze(1))).clamp_(min=0).log_()
        # Where g is 0 it is log p but for a constant: exactly, and below the smallest number, too.
        left = torch.where(g > 0, left, log_p + scale.log()).masked_fill_(log_p == NEVER, NEVER)
        return _or_target(left, log_p)

    return rows


def widened(probs: Tensor, size: int) -> Tensor:
    """Rows of laws over a vocabulary of `size` tokens: the draft's may be smaller, or padded."""
    return probs if probs.shape[-1] == size else pad(probs, (0, size - probs.shape[-1]))


def mixed(drafted: Drafted[Dense], weigh: Callable[[Tensor], Tensor]) -> Verdict:
    """The law v = w p + (1 - w) q, q being what p allows of g: min(1, v / g), and what falls is drawn from (v - g)+.

    `weigh` makes w in [0, 1] of TV(p, q). It must not look at the drawn token: the law would not be v. Where g has
    nothing in common with p, v is p.
    """
    kept, distance = _common(drafted)
    weight = drafted.where_free(weigh(distance), 1.0).where(kept > 0, 1.0)
    share = ((1 - weight) / kept).where(weight < 1, 0.0)
    log_ratio = log_ratios(drafted.law, drafted)
    chances = (weight * log_ratio.exp() + share).where(log_ratio > NEVER, 0.0)  # of a token that g can draw
    remainder = left_over(drafted.law, drafted.log_probs, weight, share)
    return drawn(drafted, chances, remainder, (1 - weight) * distance)


def _common(drafted: Drafted[Dense]) -> tuple[Tensor, Tensor]:
    """How much of g lies where p > 0, and TV(p, q) of p and that part of g, normalised. NaN and 0 where g is broken.

    Position by position, as one matrix of all rows would be the largest of the step.
    """
    kept, distance = torch.zeros_like(drafted.log_p), torch.zeros_like(drafted.log_p)
    for step in range(kept.shape[1]):
        log_p = drafted.log_probs[:, step]
        g = widened(drafted.law.probs[:, step], log_p.shape[1])
        allowed = g.where(log_p > NEVER, 0.0)
        mass = allowed.sum(1, keepdim=True)
        kept[:, step] = mass.squeeze(1) / g.sum(1)  # exactly 1 where p allows all
        distance[:, step] = (allowed / mass).sub_(log_p.exp()).abs_().sum(1) / 2
    return kept, distance.nan_to_num_(0.0)


def lifted(drafted: Drafted[Dense], gain: Gain, known: Tensor) -> Verdict:
    """p times a factor may stand: A = min(g, p gain), and what falls is drawn from (p - g)+.

    As no gain is under 1, (p - g)+ is (p - A)+, which leaves the least distance to p that this A allows: sum (A - p)+.
    `known` [n, k] is what `gain` needs to know of a row; the same for all tokens of it.
    """
    chances = _lift(log_ratios(drafted.law, drafted), drafted.where_free(gain(drafted.log_p, known), 0.0))
    bias = torch.zeros_like(drafted.log_p)
    for step in range(bias.shape[1]):
        log_p = drafted.log_probs[:, step]
        g = widened(drafted.law.probs[:, step], log_p.shape[1])
        factor = gain(log_p, known[:, step : step + 1]).to(log_p.dtype)
        bias[:, step] = _lift(log_p, factor).minimum(g).sub_(log_p.exp()).clamp_(min=0).sum(1)
    return drawn(drafted, chances, bias=drafted.where_free(bias, 0.0))


# ---- both ------------------------------------------------------------------------------------------------


def blend(proposal: DraftProposal, target: TargetRows, weight: Tensor) -> Verdict:
    """Ensembles of p and what the draft thinks, p having this weight, [n, k] or [n, 1]."""
    match proposal.law:
        case Delta():
            chain = Drafted(proposal.law, proposal.tokens, target)
            return chosen(chain, weight * chain.log_p.exp() + (1 - weight) * own_mass(proposal))
        case Dense():
            return mixed(Drafted(proposal.law, proposal.tokens, target), lambda _: weight)


def stretch(proposal: DraftProposal, target: TargetRows, gain: Gain, known: Tensor) -> Verdict:
    """Rules that look at p alone, by a factor for each token; see `lifted`. `known` is [n, k] or [n, 1]."""
    known = known.expand(proposal.tokens.shape)
    match proposal.law:
        case Delta():
            chain = Drafted(proposal.law, proposal.tokens, target)
            return chosen(chain, _lift(chain.log_p, gain(chain.log_p, known)))
        case Dense():
            return lifted(Drafted(proposal.law, proposal.tokens, target), gain, known)
