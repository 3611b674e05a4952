"""Whole sequences under a grammar, by their law: that of the target with all that the grammar forbids left out.

Drafted tokens are drawn without a look at the grammar. Those behind an illegal one are never verified, but that one is:
it has to fall, or the law of what comes in its place would be another.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from engine.grammar import Grammar
from engine.pipelines import shaping
from engine.pipelines.autoregressive import AutoregressivePipeline
from engine.pipelines.speculative import SpeculativePipeline
from engine.pipelines.states import Share
from engine.protocols import DraftProposal, Verifier
from engine.structured.grammars import Grammars
from engine.structured.vocabulary import Texts, Vocabulary
from engine.types import Request, SamplingParams
from engine.verifiers.block import BlockVerifier
from engine.verifiers.rejection import RejectionVerifier
from engine.verifiers.strict import StrictVerifier
from tests.laws import REFUSED, p_value
from tests.relaxed import under, verifiers
from tests.sequences import (
    LENGTH,
    VOCAB,
    SegmentDrafter,
    SegmentRunner,
    Segments,
    context,
    decode,
    requests,
    segment_counts,
)

SEGMENTS = Segments(1)
LETTERS = [b"a", b"b", b"c", b"<end>"]  # the model has no logits of the last
SEGMENT = "(a[ac]|b[abc]|c[cb])([ab]c|c[abc])"
GRAMMAR = Grammar("regex", f"({SEGMENT})*")
WEIGHING: dict[str, Callable[[], Verifier]] = {"rejection": RejectionVerifier, "block": BlockVerifier}


def grammars() -> Grammars:
    made = Grammars(Path(), VOCAB)
    made._vocabulary = Vocabulary(LETTERS, frozenset({3}), (3,), Texts(LETTERS[:3]))
    return made


def pipeline(drafter: SegmentDrafter, offered: list[Verifier], *, sample: bool = False) -> SpeculativePipeline:
    runner = SegmentRunner(SEGMENTS)
    return SpeculativePipeline(runner, drafter, offered, drafter.most, sample=sample, grammars=grammars())


def spelt(tokens: tuple[int, ...]) -> str:
    return "".join("abc"[token] for token in tokens)


def law(top_k: int = 0, temperature: float = 1.0) -> list[float]:
    """Of all segments, from the list of those that are in the language."""
    legal = {spelt(tokens) for tokens in itertools.product(range(VOCAB), repeat=LENGTH)}
    legal = {text for text in legal if re.fullmatch(SEGMENT, text)}
    beginnings = {text[:length] for text in legal for length in range(LENGTH + 1)}
    found = []
    for tokens in itertools.product(range(VOCAB), repeat=LENGTH):
        chance = 1.0
        for place, token in enumerate(tokens):
            if chance == 0:
                break
            row = SEGMENTS.target[context(tokens[:place])].double() / temperature
            row = torch.tensor(
                [row[i] if spelt(tokens[:place]) + "abc"[i] in beginnings else -torch.inf for i in range(VOCAB)]
            )
            if top_k:
                row[row < row.topk(top_k).values[-1]] = -torch.inf
            chance *= float(row.softmax(0)[token])
        found.append(chance)
    return found


def asked(n: int, **sampling: object) -> list[Request]:
    return requests(n, grammar=GRAMMAR, **sampling)  # type: ignore[arg-type]


@pytest.fixture
def n(full: bool) -> int:
    """Requests; each writes 6 segments."""
    return 4000 if full else 250


CASES: dict[str, dict[str, object]] = {
    "as it is": {},
    "tempered": {"temperature": 0.6},
    "truncated": {"top_k": 2},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["chain", "marginals"])
@pytest.mark.parametrize("verifier", WEIGHING)
def test_drawn_drafts_leave_the_law_of_the_grammar(verifier: str, kind: str, name: str, n: int) -> None:
    made = pipeline(SegmentDrafter(SEGMENTS, kind), [WEIGHING[verifier]()], sample=True)
    outputs, results = decode(made, asked(n, **CASES[name]))
    params = SamplingParams(max_tokens=1, **CASES[name])  # type: ignore[arg-type]
    assert p_value(segment_counts(outputs), law(params.top_k, params.temperature)) > REFUSED
    assert len({result.drafted for result in results}) >= 3, "nothing was cut"
    assert sum(result.accepted for result in results) > 0.3 * sum(result.drafted for result in results)


@pytest.mark.parametrize("kind", ["chain", "marginals"])
@pytest.mark.parametrize("verifier", [RejectionVerifier, StrictVerifier])
def test_chosen_drafts_leave_the_law_of_the_grammar(verifier: Callable[[], Verifier], kind: str, n: int) -> None:
    outputs, results = decode(pipeline(SegmentDrafter(SEGMENTS, kind), [verifier()]), asked(n))
    assert p_value(segment_counts(outputs), law()) > REFUSED
    assert len({result.drafted for result in results}) >= 2, "nothing was cut"


def test_strict_writes_what_plain_decoding_writes() -> None:
    plain, _ = decode(AutoregressivePipeline(SegmentRunner(SEGMENTS), grammars=grammars()), asked(60), (0,))
    for kind in ("chain", "marginals"):
        outputs, _ = decode(pipeline(SegmentDrafter(SEGMENTS, kind), [StrictVerifier()]), asked(60))
        for name, tokens in outputs.items():
            size = min(len(tokens), len(plain[name]))
            assert tokens[:size] == plain[name][:size]


def test_drawn_drafts_that_end_before_the_illegal_token_bend_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """All is the same to the target but c, which is forbidden; the draft likes a and c."""
    fair = Segments(1)
    fair.target, fair.draft = torch.zeros_like(fair.target), torch.tensor([0.45, 0.1, 0.45]).log().expand_as(fair.draft)
    even = [1 / 16 if 2 not in tokens else 0.0 for tokens in itertools.product(range(VOCAB), repeat=LENGTH)]
    within = shaping.lawful

    def before(drawing: Sequence[Share], proposal: DraftProposal, lengths: Sequence[int]) -> list[int]:
        found = within(drawing, proposal, lengths)
        for i, share in enumerate(drawing):
            assert share.state.sampling.grammar is not None
            legal = share.state.sampling.grammar.legal(proposal.tokens[i, : lengths[i]].tolist())
            found[i] = [*legal, False].index(False)
        return found

    for cut, bends in ((within, False), (before, True)):
        monkeypatch.setattr(shaping, "lawful", cut)
        drafter = SegmentDrafter(fair, most=3)
        runner, kept = SegmentRunner(fair), grammars()
        made = SpeculativePipeline(runner, drafter, [RejectionVerifier()], 3, sample=True, grammars=kept)
        outputs, _ = decode(made, requests(150, grammar=Grammar("regex", "[ab]*")))
        assert (p_value(segment_counts(outputs), even) < REFUSED) == bends


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("name", ["ensemble", "typical", "lenient", "bounded", "top_k_gap", "diversed"])
def test_relaxed_verifiers_keep_to_the_grammar(name: str, sample: bool) -> None:
    """However far they leave the target's law, what it has nothing of never stands."""
    made = pipeline(SegmentDrafter(SEGMENTS), verifiers(name))
    for temperature in (1.0, 0.0):
        every = [under(one, name, sample=sample) for one in asked(40, temperature=temperature)]
        outputs, results = decode(made, every)
        for tokens in outputs.values():
            text = spelt(tuple(tokens))
            assert re.fullmatch(f"({SEGMENT})*", text[: len(text) // LENGTH * LENGTH]), text
        assert sum(result.accepted for result in results) > 100
