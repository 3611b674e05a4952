"""What of a draft a grammar leaves: forced tokens in its place, nothing behind an illegal one, and what is learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from engine.grammar import Grammar
from engine.pipelines.choices import Choice
from engine.pipelines.forcing import force
from engine.pipelines.rounds import Round
from engine.pipelines.shaping import Shaper
from engine.pipelines.states import SeqState, Share
from engine.protocols import Dense, DraftProposal, Options
from engine.runtime.sampler import SamplingState
from engine.structured.matcher import Matcher
from engine.structured.state import GrammarState
from engine.structured.vocabulary import Texts, Vocabulary
from engine.types import Request, SamplingParams, ScheduledSeq
from engine.verifiers.rejection import RejectionVerifier

WORDS = [bytes([letter]) for letter in b"abcdef"] + [b"<eos>"]
A, B, C, D, E, F, EOS = range(7)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(WORDS, frozenset({EOS}), (EOS,), Texts(WORDS[:EOS]))


def share(vocabulary: Vocabulary, pattern: str, drawn: bool = False, lookahead: int = 8) -> Share:
    """A request at the beginning of its answer; without a pattern it has no grammar."""
    state = None
    if pattern:
        state = GrammarState(Matcher.compile(Grammar("regex", pattern), vocabulary), vocabulary)
    request = Request("r", (1,) * 5, SamplingParams(max_tokens=20))
    verifier = RejectionVerifier()
    made = SeqState([1] * 5, 5, SamplingState(request, (), state), 4, Choice(verifier, verifier, drawn=drawn))
    return Share(ScheduledSeq("r", 4, (1,), lookahead, tuple(range(8))), made, 4, (1,), samples=True)


def proposed(*chains: Sequence[int]) -> DraftProposal:
    width = max(map(len, chains))
    tokens = torch.tensor([[*chain, *([-1] * (width - len(chain)))] for chain in chains], dtype=torch.int64)
    return DraftProposal(tokens.view(len(chains), width), tuple(map(len, chains)))


def test_forced_tokens_take_the_place_of_drafts_that_begin_otherwise(vocabulary: Vocabulary) -> None:
    drawing = [
        share(vocabulary, "abcd(e|f)"),
        share(vocabulary, "abc(d|e)f"),
        share(vocabulary, "(a|b)c"),
        share(vocabulary, ""),
        share(vocabulary, "abcdef", lookahead=2),
        share(vocabulary, "abcdef", lookahead=0),
    ]
    whole = proposed([A, C], [A, B, C, D, F], [D], [F, F], [], [])
    got, sure = force(drawing, whole, 8)
    assert sure == {0, 4} and got.lengths == (4, 5, 1, 2, 2, 0)
    assert got.tokens.tolist()[0] == [A, B, C, D, -1] and got.tokens.tolist()[4] == [A, B, -1, -1, -1]
    assert torch.equal(got.tokens[1:4], whole.tokens[1:4])
    assert force(drawing, whole, 3)[0].lengths == (3, 5, 1, 2, 2, 0)
    assert force(drawing[2:4], whole, 8) == (whole, frozenset())


def test_nothing_was_drafted_but_a_grammar_forces(vocabulary: Vocabulary) -> None:
    drawing = [share(vocabulary, "abc"), share(vocabulary, "")]
    shape = Shaper(most=8).shape(drawing, 2, proposed([], []))
    assert [one.drafts for one in drawing] == [[A, B, C], []] and shape.proposal.lengths == (3, 0)


def test_drawn_drafts_and_what_is_said_of_chosen_ones_keep_their_shape(vocabulary: Vocabulary) -> None:
    drawing = [share(vocabulary, "abcdef", drawn=True), share(vocabulary, "abcdef")]
    whole = replace(proposed([B, B], [B, B]), law=Dense(torch.rand(1, 2, 7), (0,)), hidden=torch.rand(2, 2, 3))
    got, sure = force(drawing, whole, 8)
    assert sure == {1} and got.tokens.tolist() == [[B, B], [A, B]] and got.hidden is whole.hidden


def test_chains_end_before_an_illegal_token_or_behind_it_if_it_was_drawn(vocabulary: Vocabulary) -> None:
    pattern = "(a|b)(c|d)(e|f)"
    chains = [[A, C, E], [A, A, E], [F, C, E], [B, D, E, EOS, A], [A, EOS, F]]
    for drawn in (False, True):
        drawing = [share(vocabulary, pattern, drawn) for _ in chains] + [share(vocabulary, "")]
        whole = proposed(*chains, [A, A, A, A])
        if drawn:
            whole = replace(whole, law=Dense(torch.rand(6, 5, 7)))
        shape = Shaper().shape(drawing, 6, whole)
        assert shape.proposal.lengths == ((3, 2, 1, 5, 2, 4) if drawn else (3, 1, 0, 4, 1, 4))
        assert [len(one.drafts) for one in drawing] == [*shape.proposal.lengths]


def test_trees_have_legal_nodes_only_and_forced_chains(vocabulary: Vocabulary) -> None:
    tokens = torch.tensor([[[A, F, B], [F, C, D], [E, A, B]]]).expand(3, -1, -1)
    options = Options(tokens, torch.tensor([0.5, 0.3, 0.2]).log().expand(3, 3, 3))
    drawing = [share(vocabulary, "(a|b)(c|d)(e|f)", lookahead=40), share(vocabulary, "abcd"), share(vocabulary, "")]
    whole = replace(proposed([A, F, E], [A, F, E], [A, F, E]), options=options)
    shape = Shaper(40, 3).shape(drawing, 3, whole)
    legal, forced, free = (one.tree for one in drawing)
    assert legal is not None and forced is not None and free is not None
    paths: list[list[int]] = []
    for node, parent in enumerate(legal.parents):
        above = [] if parent < 0 else paths[parent]
        paths.append([*above, legal.tokens[node]])
    assert sorted(paths) == sorted(
        [[A], [B], *([x, y] for x in (A, B) for y in (C, D)), *([x, y, E] for x in (A, B) for y in (C, D))]
    )
    assert [legal.depths[node] for node in range(len(paths))] == [len(path) for path in paths]
    assert (forced.tokens, forced.parents) == ((A, B, C), (-1, 0, 1)) and len(free.tokens) == 8
    assert shape.sure == {1}


def test_what_a_grammar_decides_says_nothing_of_the_drafter(vocabulary: Vocabulary) -> None:
    """Forced tokens are no news of margins; drafts that were cut short would not have stood behind the cut."""
    shaper = Shaper(most=8)
    for _ in range(300):
        drawing = [share(vocabulary, "abc"), share(vocabulary, "(a|b)(c|d)(e|f)"), share(vocabulary, "")]
        whole = replace(proposed([F, F, F], [A, F, E], [A, B, C]), margins=torch.zeros(3, 3))
        shape = shaper.shape(drawing, 3, whole)
        assert shape.chances is not None and shape.chances[0] == [1.0] * 3 and len(shape.chances[1]) == 1
        rounds = [Round([A, B, C, EOS], [0] * 4, [0, 1, 2]), Round([A, C], [0] * 2, [0]), Round([D], [0])]
        shaper.observe(drawing, shape, rounds)
        assert rounds[0].foreseen[0] == rounds[1].foreseen[0] == 0.0 and rounds[2].foreseen[0] == 0.0
    # The free request's first token always fell, and one like it stood where it was legal: never the forced ones.
    assert shape.chances is not None and shape.chances[2][0] == pytest.approx(0.5, abs=0.1)
