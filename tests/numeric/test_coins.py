"""Drafted tokens and the coins of their verification: laws as asked for, streams that share no number."""

from __future__ import annotations

import pytest
import torch

from engine.pipelines.coins import Coins, RequestSampler
from engine.protocols import Dense, DraftProposal, TargetRows
from engine.runtime.rng import Draw, Purpose, gumbel, uniform_rows
from engine.runtime.sampler import Sampler, SamplingState
from engine.types import SamplingParams
from engine.verifiers.rejection import RejectionVerifier
from tests.laws import REFUSED, p_value, rate_p_value, states, total_variation
from tests.numeric.sampler_reference import law
from tests.numeric.sampler_reference import state as one_state

CPU = torch.device("cpu")
VOCAB = 40
ASKED: list[dict[str, object]] = [
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 0.4, "top_k": 5},
    {"temperature": 1.6, "top_p": 0.7},
    {"temperature": 0.9, "min_p": 0.2},
    {"temperature": 1.2, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 3.0, "bad_words": ((1,),)},
]


def asking() -> list[SamplingState]:
    return [one_state(prompt=(1, 2), seed=seed, **options) for seed, options in enumerate(ASKED)]  # type: ignore[arg-type]


def some_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def test_drafts_have_the_requests_temperature_and_truncations_and_no_other_rule() -> None:
    logits = some_logits(len(ASKED) * 4)
    asks, steps = [row // 4 for row in range(len(logits))], [row % 4 for row in range(len(logits))]
    tokens, laws = RequestSampler(asking()).draw(logits, asks, steps)
    assert tokens.dtype == torch.int64 and laws.dtype == torch.float32
    for row, ask in enumerate(asks):
        params = SamplingParams(max_tokens=1, **ASKED[ask])  # type: ignore[arg-type]
        if params.temperature == 0:
            assert tokens[row] == logits[row].argmax() and laws[row].count_nonzero() == 1
            assert laws[row, tokens[row]] == 1
        else:
            assert laws[row].tolist() == pytest.approx(law(logits[row].tolist(), params), abs=1e-6)
        assert laws[row, tokens[row]] > 0


def test_drafts_are_functions_of_request_and_position() -> None:
    """Whoever else is drafted for, in whatever order, in one call or in many; and the logits are only read."""
    logits, wanted = some_logits(12), []
    asks, steps = [0, 2, 3, 4, 5, 1] * 2, [0] * 6 + [1] * 6
    before = logits.clone()
    tokens, laws = RequestSampler(asking()).draw(logits, asks, steps)
    sampler = RequestSampler(asking())
    for row in reversed(range(12)):
        drawn, one = sampler.draw(logits[row : row + 1], asks[row : row + 1], steps[row : row + 1])
        wanted.append((int(drawn), one[0]))
    assert tokens.tolist() == [token for token, _ in reversed(wanted)]
    assert torch.equal(laws, torch.stack([one for _, one in reversed(wanted)]))
    again = [sampler.draw(logits[part], asks[part], steps[part])[0] for part in (slice(0, 6), slice(6, 12))]
    assert torch.equal(torch.cat(again), tokens) and torch.equal(logits, before)


def test_the_numbers_are_those_of_the_position_and_the_place() -> None:
    state = asking()[0]
    logits = some_logits(3)
    tokens, _ = RequestSampler([state]).draw(logits, (0, 0, 0), (0, 1, 2))
    for step in range(3):
        noise = gumbel(0, 0, state.position + step, Purpose.DRAFT, VOCAB, "cpu", step)
        assert tokens[step] == (logits[step] + noise).argmax()
    coins = Coins([state], 3, CPU)
    assert torch.equal(coins.uniforms(), uniform_rows([Draw(0, 0, state.position, Purpose.ACCEPT)], 3, "cpu"))
    weights = logits[:2].double()
    drawn = coins.draw(weights, torch.tensor([0, 0]), torch.tensor([2, 0]))
    for row, step in enumerate((2, 0)):
        noise = gumbel(0, 0, state.position + step, Purpose.RESIDUAL, VOCAB, "cpu", step)
        assert drawn[row] == (weights[row] + noise).argmax()


def test_only_those_that_wish_it_are_drawn_for() -> None:
    """The others have the likeliest token, greedy or not; and the draws of a request do not hang on who else draws."""
    logits = some_logits(len(ASKED))
    rows, steps = range(len(ASKED)), (0,) * len(ASKED)
    drawn = [index in (2, 4) for index in rows]
    sampler = RequestSampler(asking(), drawn)
    assert [sampler.draws(index) for index in rows] == drawn
    assert [RequestSampler(asking()).draws(index) for index in rows] == [index != 1 for index in rows]
    (tokens, laws), (all_tokens, all_laws) = (
        sampler.draw(logits, rows, steps),
        RequestSampler(asking()).draw(logits, rows, steps),
    )
    for row in rows:
        if drawn[row]:
            assert tokens[row] == all_tokens[row] and torch.equal(laws[row], all_laws[row])
        else:
            assert tokens[row] == logits[row].argmax() and torch.equal(laws[row], torch.eye(VOCAB)[tokens[row]])


def test_no_two_rounds_share_a_coin() -> None:
    """The same position in another place of a draft: block verification has looked at the coins behind a rejection."""
    early, late = one_state(prompt=(1,), seed=3), one_state(prompt=(1, 2), seed=3)
    first, second = (Coins([state], 8, CPU).uniforms()[0] for state in (early, late))
    assert not set(first.tolist()) & set(second.tolist())


def test_later_rounds_draft_a_position_from_other_numbers() -> None:
    """What was discarded may have shaped the next draft by the margins behind it."""
    early, late = one_state(prompt=(1,), seed=3), one_state(prompt=(1, 2), seed=3)
    flat = torch.zeros(1, 5000)
    drafts = [RequestSampler([state]).draw(flat, (0,), (step,))[0] for state, step in ((early, 1), (late, 0))]
    assert drafts[0] != drafts[1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_no_numbers_are_drafted_as_what_they_are(bad: float) -> None:
    logits = some_logits(len(ASKED))
    logits[:, 7] = bad
    tokens, laws = RequestSampler(asking()).draw(logits, range(len(ASKED)), (0,) * len(ASKED))
    assert (tokens == 7).all() and torch.equal(laws, torch.eye(VOCAB)[7].expand(len(ASKED), VOCAB))


def test_tokens_that_the_draft_does_not_know_are_never_drafted() -> None:
    logits = some_logits(len(ASKED)).index_fill(1, torch.arange(0, VOCAB, 2), float("-inf"))
    tokens, laws = RequestSampler(asking()).draw(logits, range(len(ASKED)), (0,) * len(ASKED))
    assert (tokens % 2 == 1).all() and not laws[:, ::2].any()
    assert torch.allclose(laws.sum(1), torch.ones(len(ASKED)))


# ---- streams ---------------------------------------------------------------------------------------------

P = torch.tensor([0.3, 0.2, 0.16, 0.12, 0.09, 0.06, 0.04, 0.03]).log()  # and q ranks its tokens the other way round
N = 12_000


def through_real_streams() -> tuple[float, float]:
    """p-values of the committed tokens' law and of the acceptance rate, drafts and coins from the requests' streams."""
    asking = states(N)
    tokens, laws = RequestSampler(asking).draw(P.flip(0).expand(N, 8), range(N), (0,) * N)
    log_probs = P.expand(N, 2, 8)
    drawn = Sampler(8).sample(log_probs[:, 0], asking).tokens
    target = TargetRows(drawn.unsqueeze(1).expand(N, 2), log_probs, Coins(asking, 1, CPU))
    verdict = RejectionVerifier().verify(DraftProposal(tokens.unsqueeze(1), (1,) * N, Dense(laws.unsqueeze(1))), target)
    stood = verdict.accepted > 0
    first = torch.where(stood, tokens, verdict.next_token)
    law = P.double().exp()
    rate = 1 - total_variation(law, law.flip(0))
    drafted = p_value(tokens.bincount(minlength=8).tolist(), law.flip(0).tolist())
    assert drafted > REFUSED
    counts = first.bincount(minlength=8).tolist()
    return p_value(counts, law.tolist()), rate_p_value(int(stood.sum()), N, rate)


def test_the_streams_of_a_draft_are_apart() -> None:
    law, rate = through_real_streams()
    assert law > REFUSED and rate > REFUSED


@pytest.mark.parametrize(
    ("one", "other"),
    [(Purpose.RESIDUAL, Purpose.DRAFT), (Purpose.ACCEPT, Purpose.DRAFT), (Purpose.RESIDUAL, Purpose.ACCEPT)],
)
def test_streams_that_share_numbers_are_found_out(
    monkeypatch: pytest.MonkeyPatch, one: Purpose, other: Purpose
) -> None:
    plain = SamplingState.draw
    monkeypatch.setattr(
        SamplingState, "draw", lambda self, purpose=Purpose.TARGET: plain(self, other if purpose == one else purpose)
    )
    found = through_real_streams()
    assert min(found) < REFUSED
