"""The prompt look-up drafter, the strict verifier, and the sampler's view of tokens that are only drafted."""

from __future__ import annotations

import random

import pytest
import torch

from engine.drafters.ngram import CERTAIN, LONGEST, PLACES, SHORTEST, NgramDrafter
from engine.protocols import DraftAsk, DraftProposal, TargetRows
from engine.runtime.sampler import Sampler, SamplingState
from engine.types import Request, SamplingParams
from engine.verifiers.strict import StrictVerifier


def draft(tokens: list[int], limit: int = 8) -> list[int]:
    drafter = NgramDrafter()
    drafter.admit("a", tokens)
    proposal = drafter.propose([DraftAsk("a", limit)])
    assert proposal.tokens.shape == (1, proposal.lengths[0])
    return proposal.tokens[0].tolist()


class TestNgram:
    def test_what_followed_before_is_proposed(self) -> None:
        story = list(range(100, 130))
        assert draft([*story, *story[:CERTAIN]]) == story[CERTAIN : CERTAIN + 8]

    def test_nothing_is_proposed_where_nothing_agrees(self) -> None:
        assert draft(list(range(50))) == []
        assert draft([]) == [] and draft([1, 2]) == []
        assert draft([1, 2, 3, 4, 9, 2, 3]) == [], f"{SHORTEST} tokens must agree"

    def test_short_agreement_earns_a_short_draft(self) -> None:
        assert draft([1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]) == [4, 5]
        assert draft([9, 1, 2, 3, 4, 5, 6, 7, 9, 1, 2, 3]) == [4, 5, 6]

    def test_the_longest_agreement_wins_and_of_equals_the_latest(self) -> None:
        old, new = [8, 7, 1, 2, 3, 50, 51, 52], [1, 2, 3, 60, 61, 62]
        assert draft([*old, *new, 8, 7, 1, 2, 3])[0] == 50
        assert draft([*new, 0, 1, 2, 3, 70, 71, 9, 1, 2, 3])[0] == 70

    def test_a_loop_is_followed_past_the_end_of_what_is_known(self) -> None:
        assert draft([1, 2, 3, 4] * 4, 10) == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
        assert draft([5] * 20, 6) == [5] * 6

    def test_limits_are_kept(self) -> None:
        assert draft([1, 2, 3, 4] * 4, 3) == [1, 2, 3] and draft([1, 2, 3, 4] * 4, 0) == []

    def test_only_the_latest_places_are_compared(self) -> None:
        far = [*range(10, 10 + LONGEST), 99]
        between = [token for i in range(PLACES) for token in (*far[-4:-1], 200 + i)]
        assert draft([*far, *between, *far[:-1]])[0] == 200 + PLACES - 1

    def test_requests_of_a_batch_are_apart_and_rows_are_padded(self) -> None:
        drafter = NgramDrafter()
        for name, tokens in (("a", [1, 2, 3, 4] * 3), ("b", [5, 6]), ("c", [7, 8, 9, 7, 8, 9])):
            drafter.admit(name, tokens)
        drafter.commit("b", [5, 6, 5, 6, 5, 6])
        asks = [DraftAsk("a", 3), DraftAsk("b", 4), DraftAsk("c", 0)]
        proposal = drafter.propose(asks)
        assert proposal.lengths == (3, 4, 0)
        assert proposal.tokens.tolist() == [[1, 2, 3, -1], [5, 6, 5, 6], [-1, -1, -1, -1]]
        drafter.drop("a")
        with pytest.raises(KeyError):
            drafter.propose(asks)

    def test_what_is_committed_bit_by_bit_is_what_was_admitted_at_once(self) -> None:
        rng = random.Random(2)
        tokens = [rng.randrange(4) for _ in range(300)]
        drafter = NgramDrafter()
        drafter.admit("a", [])
        for token in tokens:
            drafter.commit("a", [token])
        assert drafter.propose([DraftAsk("a", 8)]).tokens[0].tolist() == draft(tokens)


def naive_strict(tokens: list[int], draws: list[int]) -> tuple[int, int]:
    """One draft by a plain loop: how many stand, and the token after them."""
    for step, token in enumerate(tokens):
        if token != draws[step]:
            return step, draws[step]
    return len(tokens), draws[len(tokens)]


class TestStrict:
    def test_equals_a_plain_loop_over_ragged_drafts(self) -> None:
        rng = random.Random(4)
        for _ in range(200):
            lengths = tuple(rng.randint(0, 5) for _ in range(rng.randint(1, 6)))
            width = max(lengths)
            rows = [[rng.randrange(2) for _ in range(length)] for length in lengths]
            draws = [[rng.choice((0, 0, 1, -1)) for _ in range(length + 1)] for length in lengths]
            proposal = DraftProposal(padded(rows, width), lengths)
            verdict = StrictVerifier().verify(proposal, TargetRows(padded(draws, width + 1)))
            expected = [naive_strict(row, draw) for row, draw in zip(rows, draws, strict=True)]
            assert list(zip(verdict.accepted.tolist(), verdict.next_token.tolist(), strict=True)) == expected
            for (accepted, _), path in zip(expected, verdict.path.tolist(), strict=True):
                assert path == [*range(accepted), *([-1] * (width - accepted))]
            assert verdict.bias is None

    def test_a_row_that_can_not_be_drawn_does_not_agree_with_padding(self) -> None:
        proposal = DraftProposal(torch.tensor([[3, -1, -1], [4, 5, 6]]), (1, 3))
        verdict = StrictVerifier().verify(proposal, TargetRows(torch.tensor([[3, -1, -1, -1], [4, 5, 6, 7]])))
        assert verdict.accepted.tolist() == [1, 3] and verdict.next_token.tolist() == [-1, 7]


def padded(rows: list[list[int]], width: int) -> torch.Tensor:
    return torch.tensor([[*row, *([-1] * (width - len(row)))] for row in rows]).view(len(rows), width)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.0, "min_tokens": 3, "stop_token_ids": (1, 2, 3, 4, 5)},
        {"presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 1.4, "temperature": 0.0},
        {"temperature": 0.8, "bad_words": ((7,), (3, 4), (1, 2, 3)), "logit_bias": ((5, 2.0),), "top_k": 5},
    ],
)
def test_states_ahead_draw_what_states_that_were_pushed_draw(fields: dict[str, object]) -> None:
    vocab = 12
    generator = torch.Generator().manual_seed(1)
    request = Request("a", (1, 2, 3), SamplingParams(max_tokens=20, seed=3, **fields))  # type: ignore[arg-type]
    sampler = Sampler(vocab)
    tokens = [3, 4, 1, 2, 3, 3]
    state = SamplingState(request, (2,))
    logits = torch.randn(len(tokens) + 1, vocab, generator=generator)
    ahead = state.ahead(tokens)
    together = sampler.sample(logits, ahead).tokens.tolist()
    for row in range(len(tokens) + 1):
        alone = SamplingState(request, (2, *tokens[:row]))
        assert list(ahead[row].banned()) == list(alone.banned())
        assert Sampler(vocab).sample(logits[row : row + 1], [alone]).tokens.tolist() == together[row : row + 1], row
    again = sampler.sample(logits[:1], [state]).tokens.tolist()
    assert (again, state.num_outputs) == (together[:1], 1), "looking ahead changes nothing"
