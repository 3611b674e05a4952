"""The exact law of what a verifier commits, read off its own `verify` and nothing else.

With which chance a token stands is found by bisection on its coin; what replaces it is the law that `verify` asks a
draw from. Sums over all that can be drafted then give laws to some 1e-6, without a single sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from engine.protocols import Delta, Dense, DraftProposal, Rows, Scalar, TargetRows, Verdict, Verifier
from engine.registry import VERIFIERS, resolve
from engine.verifiers.diversed import DiversedVerifier

LOW, HIGH = 2.0**-53, 1 - 2.0**-53  # the outermost coins
Knobs = Mapping[str, float]
KNOBS: dict[str, Knobs] = {
    "ensemble": {"target_weight": 0.6},
    "diversed": {"min_weight": 0.3},
    "bounded": {"epsilon": 0.15},
    "lenient": {"lenience": 0.5},
    "typical": {"posterior_threshold": 0.3, "posterior_alpha": 0.4},
    "top_k_gap": {"relaxed_topk": 2.0, "relaxed_delta": 0.8},
}
NEUTRAL: dict[str, Knobs] = {
    "ensemble": {"target_weight": 1.0},
    "diversed": {"min_weight": 1.0},
    "bounded": {"epsilon": 0.0},
    "lenient": {"lenience": 1.0},
}
Text = tuple[int, ...]
Laws = Callable[[Text], Tensor]  # tokens so far -> probabilities [vocabulary]


@dataclass
class Given:
    """See `protocols.Chance`: these coins, and the likeliest token of each law that is asked for; keeps these laws."""

    coins: Tensor
    asked: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def uniforms(self) -> Tensor:
        return self.coins

    def draw(self, log_weights: Tensor, drafts: Tensor, steps: Tensor) -> Tensor:
        assert log_weights.dtype == torch.float64 and not log_weights.isnan().any()
        for row, place in enumerate(zip(drafts.tolist(), steps.tolist(), strict=True)):
            self.asked[place] = log_weights[row].softmax(0)
        return log_weights.argmax(1)


def rows_of(log_p: Tensor, knobs: Knobs, **more: Tensor | None) -> TargetRows:
    """What the target says of n drafts: its laws [n, k + 1, vocabulary]; its own draws are the likeliest tokens."""
    values = {name: torch.full((len(log_p),), value, dtype=torch.float64) for name, value in knobs.items()}
    return TargetRows(log_p.argmax(-1), log_p, knobs=values, **more)  # type: ignore[arg-type]


def chances(verifier: Verifier, proposal: DraftProposal, target: TargetRows, others: float = LOW) -> Tensor:
    """The coins [n, k] float64 below which the tokens stand where all other coins are `others`."""
    found = torch.zeros(proposal.tokens.shape, dtype=torch.float64)
    for step in range(found.shape[1]):
        low, high = torch.zeros(len(found), dtype=torch.float64), torch.ones(len(found), dtype=torch.float64)
        for turn in range(28):
            middle = torch.full_like(low, HIGH) if turn == 0 else (low + high) / 2
            coins = torch.full_like(found, others)
            coins[:, step] = middle
            stands = verifier.verify(proposal, replace(target, chance=Given(coins))).accepted > step
            low, high = torch.where(stands, middle, low), torch.where(stands, high, middle)
        found[:, step] = torch.where(low == HIGH, 1.0, torch.where(low == 0, 0.0, high))
    return found


@dataclass(frozen=True)
class Exact:
    """Of several positions: the law of the committed token [cases, vocabulary], how often drafts stand, its bias."""

    law: Tensor
    rate: Tensor
    bias: Tensor | None


def exact(
    verifier: Verifier,
    log_p: Tensor,
    drafts: Tensor,
    knobs: Knobs | None = None,
    marginal: Tensor | None = None,
    shape: Callable[[DraftProposal], DraftProposal] = lambda proposal: proposal,
    **more: Tensor | None,
) -> Exact:
    """One drafted position, in many cases at once.

    `log_p` [cases, vocabulary]. `drafts` are the laws [cases, size] that tokens are drawn from, or tokens [cases] that
    were chosen, of which the draft itself thinks `marginal` [cases] or [cases, size]. `more` fields of the rows.
    """
    cases, size = log_p.shape
    if drafts.dtype == torch.int64:
        per_case, tokens, weights = 1, drafts, torch.ones(cases, dtype=torch.float64)
        scores: Scalar | Rows | None = None
        if marginal is not None:
            scores = (Scalar if marginal.dim() == 1 else Rows)(marginal.unsqueeze(1))
        proposal = DraftProposal(tokens.unsqueeze(1), (1,) * cases, Delta(), scores)
    else:
        per_case = drafts.shape[1]
        tokens, weights = torch.arange(per_case).repeat(cases), drafts.double().flatten()
        law = Dense(drafts.repeat_interleave(per_case, 0).unsqueeze(1))
        proposal = DraftProposal(tokens.unsqueeze(1), (1,) * len(tokens), law)
    target = rows_of(log_p.repeat_interleave(per_case, 0).unsqueeze(1).expand(-1, 2, -1), knobs or {}, **more)
    proposal = shape(proposal)
    chance = chances(verifier, proposal, target)[:, 0]
    coins = Given(torch.full((len(tokens), 1), HIGH, dtype=torch.float64))
    verdict = verifier.verify(proposal, replace(target, chance=coins))
    out = torch.zeros(cases, size, dtype=torch.float64)
    case = torch.arange(cases).repeat_interleave(per_case)
    possible = weights * chance > 0
    out.index_put_((case[possible], tokens[possible]), (weights * chance)[possible], accumulate=True)
    for row in ((chance < 1) & (weights > 0)).nonzero().flatten().tolist():
        out[case[row]] += weights[row] * (1 - chance[row]) * replacement(coins, verdict, row, 0, size)
    rate = (weights * chance).view(cases, -1).sum(1)
    return Exact(out, rate, _of_cases(verdict, weights, cases))


def replacement(coins: Given, verdict: Verdict, row: int, step: int, size: int) -> Tensor:
    """The law [size] of what follows the accepted tokens of a row: what was asked for, else the token that is said."""
    said = torch.nn.functional.one_hot(verdict.next_token[row], size).double()
    return coins.asked.get((row, step), said)


@dataclass(frozen=True)
class Head:
    """See `protocols.VerifierHead`: it says what stands first in the draft's hidden state."""

    def weights(self, hidden: Tensor, states: Tensor) -> Tensor:
        assert hidden.shape[:2] == states.shape[:2]
        return hidden[..., 0].float()


def made(name: str) -> Verifier:
    """A verifier of the registry."""
    kind = resolve(VERIFIERS, name, "verifier")
    return DiversedVerifier(Head()) if kind is DiversedVerifier else cast(type[Verifier], kind)()


def exact_diversed(log_p: Tensor, drafts: Tensor, said: Tensor, least: float, marginal: Tensor | None = None) -> Exact:
    """`exact`, of a head that says these weights [cases]."""
    rows = said if drafts.dtype == torch.int64 else said.repeat_interleave(drafts.shape[1])

    def shape(proposal: DraftProposal) -> DraftProposal:
        return replace(proposal, hidden=rows.view(-1, 1, 1))

    states = torch.zeros(len(rows), 2, 5)
    return exact(DiversedVerifier(Head()), log_p, drafts, {"min_weight": least}, marginal, shape, states=states)


def _of_cases(verdict: Verdict, weights: Tensor, cases: int) -> Tensor | None:
    """The bias at the first position, which is the same whatever was drawn there."""
    if verdict.bias is None:
        return None
    assert verdict.bias.dtype == torch.float32
    bias, live = verdict.bias[:, 0].double().view(cases, -1), weights.view(cases, -1) > 0
    said = bias.masked_fill(~live, -1.0).amax(1)
    assert ((bias - said.unsqueeze(1)).abs()[live] < 1e-6).all(), "a bias that hangs on the drawn token"
    return said


# ---- chains ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """The law of the first k tokens of an answer, and how many drafted ones stand on average."""

    law: dict[Text, float]
    accepted: float


def written(
    verifier: Verifier,
    target: Laws,
    draft: Laws,
    size: int = 3,
    width: int = 3,
    stops: Callable[[Text], bool] = lambda text: False,
    knobs: Knobs | None = None,
    chosen: bool = False,
    others: float = LOW,
) -> Written:
    """One round of up to `width` drafted tokens, then the target alone; everything enumerated.

    A draft ends early after tokens of which `stops` says so. `chosen`: the draft's laws are one-hot, and not told.
    `others` as in `chances`: HIGH for verifiers that look for the longest prefix.
    """
    drafts = [text for length in range(1, width + 1) for text in itertools.product(range(size), repeat=length)]
    drafts = [text for text in drafts if not any(stops(text[:at]) for at in range(1, len(text)))]
    drafts = [text for text in drafts if len(text) == width or stops(text)]
    drafts = [text for text in drafts if chance_of(draft, text) > 0]
    rows, laws = torch.zeros(len(drafts), width + 1, size).log(), torch.ones(len(drafts), width, size) / size  # padding
    tokens = torch.full((len(drafts), width), -1)
    for i, text in enumerate(drafts):
        tokens[i, : len(text)] = torch.tensor(text)
        for at in range(len(text) + 1):
            rows[i, at] = target(text[:at]).log().float()
            if at < len(text):
                laws[i, at] = draft(text[:at])
    lengths = tuple(map(len, drafts))
    proposal = DraftProposal(tokens, lengths, Delta() if chosen else Dense(laws))
    said = rows_of(rows, knobs or {})
    steps = torch.arange(width + 1)
    said = replace(said, draws=said.draws.masked_fill(steps > torch.tensor(lengths).unsqueeze(1), -1))
    chance = chances(verifier, proposal, said, others)
    law: dict[Text, float] = dict.fromkeys(itertools.product(range(size), repeat=width), 0.0)
    expected = 0.0
    for pattern in itertools.product((False, True), repeat=width):
        coins = Given(
            torch.tensor([LOW if stands else HIGH for stands in pattern], dtype=torch.float64).expand_as(chance)
        )
        verdict = verifier.verify(proposal, replace(said, chance=coins))
        happens = torch.where(torch.tensor(pattern), chance, 1 - chance).prod(1)
        for i, text in enumerate(drafts):
            weight, accepted = float(happens[i]) * chance_of(draft, text), int(verdict.accepted[i])
            expected += weight * accepted
            if weight > 0:
                after = coins.asked.get((i, accepted), target(text[:accepted]))
                assert ((i, accepted) in coins.asked) == (accepted < len(text))
                _continue(law, target, text[:accepted], after, weight)
    return Written(law, expected)


def chance_of(laws: Laws, text: Sequence[int]) -> float:
    """Of a text to be written by these laws, as float32 holds them."""
    chance = 1.0
    for at, token in enumerate(text):
        chance *= float(laws(tuple(text[:at]))[token].float())
    return chance


def _continue(law: dict[Text, float], target: Laws, text: Text, after: Tensor, weight: float) -> None:
    """Add to `law` what is written from `text` on: a token of the law `after`, then the target's."""
    width = len(next(iter(law)))
    if len(text) == width:
        law[text] += weight
        return
    for token, chance in enumerate(after.tolist()):
        if weight * chance > 0:
            longer = (*text, token)
            _continue(law, target, longer, target(longer), weight * chance)
