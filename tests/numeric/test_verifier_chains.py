"""Whole drafts of 3 tokens out of 3, enumerated: the law of the 27 answers, and how many drafted tokens stand.

Every draft, every pattern of coins and every token that replaces a fallen one is summed, by what `verify` itself does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from engine.verifiers.block import BlockVerifier
from engine.verifiers.ensemble import EnsembleVerifier
from engine.verifiers.rejection import RejectionVerifier
from tests.enumeration import HIGH, KNOBS, LOW, Laws, Text, Written, chance_of, made, written
from tests.laws import dirichlet

SIZE, WIDTH = 3, 3
TEXTS = list(itertools.product(range(SIZE), repeat=WIDTH))
PREFIXES = [text for length in range(1, WIDTH + 1) for text in itertools.product(range(SIZE), repeat=length)]
CLOSE = 5e-6


@cache
def row(seed: int, text: Text) -> Tensor:
    code = sum((token + 1) * (SIZE + 1) ** place for place, token in enumerate(text))
    return dirichlet(1, SIZE, 0.7, 1000 * seed + code)[0].exp()


def target(text: Text) -> Tensor:
    return row(1, text)


def chained(text: Text) -> Tensor:
    """One after another: somewhat like the target."""
    return (target(text) + row(2, text)) / 2


@cache
def marginals() -> Tensor:
    """[WIDTH, SIZE]: the target's token at each place, whatever stands before it."""
    found = torch.zeros(WIDTH, SIZE)
    for text in TEXTS:
        for place, token in enumerate(text):
            found[place, token] += chance_of(target, text)
    return found


def alone(text: Text) -> Tensor:
    return marginals()[len(text)] / marginals()[len(text)].sum()


def one_hot(text: Text) -> Tensor:
    return torch.nn.functional.one_hot(alone(text).argmax(), SIZE).float()


def tempered(text: Text) -> Tensor:
    return (chained(text).log() / 0.4).softmax(0)


def truncated(text: Text) -> Tensor:
    law = chained(text)
    law = law.where(law > law.min(), 0.0)
    return law / law.sum()


DRAFTS: dict[str, Laws] = {
    "one after another": chained,
    "each alone": alone,
    "one-hot": one_hot,
    "tempered": tempered,
    "truncated": truncated,
    "the target itself": target,
}
STOPS: dict[str, Callable[[Text], bool]] = {
    "whole": lambda text: False,
    "after the first": lambda text: len(text) == 1,
    "by earlier tokens": lambda text: text[0] == 1 or text[:2] == (2, 0),  # known before the next one is drawn
}
CHAINS = {"rejection": LOW, "block": HIGH}  # and `others` of `chances`


@cache
def round_of(verifier: str, draft: str, stops: str = "whole") -> Written:
    laws = DRAFTS[draft]
    return written(made(verifier), target, laws, stops=STOPS[stops], others=CHAINS.get(verifier, LOW))


@pytest.mark.parametrize("stops", STOPS)
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("verifier", CHAINS)
def test_answers_have_the_targets_law(verifier: str, draft: str, stops: str) -> None:
    found = round_of(verifier, draft, stops)
    assert len(found.law) == 27
    for text, chance in found.law.items():
        assert chance == pytest.approx(chance_of(target, text), abs=CLOSE), text


@pytest.mark.parametrize("draft", DRAFTS)
def test_tokens_stand_as_often_as_theory_says(draft: str) -> None:
    """Verified one by one: the sum over prefixes of E prod min(1, p / q), with no independence assumed."""
    laws = DRAFTS[draft]
    expected = sum(min_product(laws, text) for text in PREFIXES)
    assert round_of("rejection", draft).accepted == pytest.approx(expected, abs=CLOSE)


def min_product(draft: Laws, text: Text, weight: float = 1.0) -> float:
    """prod min(q, v) with v = w p + (1 - w) q."""
    product = 1.0
    for at, token in enumerate(text):
        p, q = float(target(text[:at])[token]), float(draft(text[:at])[token])
        product *= min(q, weight * p + (1 - weight) * q)
    return product


@pytest.mark.parametrize("stops", STOPS)
@pytest.mark.parametrize("draft", DRAFTS)
def test_whole_drafts_fare_no_worse_than_their_tokens(draft: str, stops: str) -> None:
    """Block verification accepts at least as much; more where tokens were drawn, nothing where they are certain."""
    block, tokens = round_of("block", draft, stops).accepted, round_of("rejection", draft, stops).accepted
    assert block >= tokens - CLOSE
    if stops == "whole" and draft in ("one after another", "each alone", "tempered"):
        assert block > tokens + 0.01
    if stops == "after the first" or draft == "the target itself":
        assert block == pytest.approx(tokens, abs=CLOSE)


def test_the_target_as_its_own_draft_always_stands() -> None:
    for verifier in CHAINS:
        assert round_of(verifier, "the target itself").accepted == pytest.approx(WIDTH, abs=1e-5)


@pytest.mark.parametrize("verifier", CHAINS)
@pytest.mark.parametrize("stops", STOPS)
def test_chosen_chains_have_the_targets_law(verifier: str, stops: str) -> None:
    """Nobody says how they were chosen; they stand while each token would."""
    found = written(made(verifier), target, one_hot, stops=STOPS[stops], chosen=True)
    for text, chance in found.law.items():
        assert chance == pytest.approx(chance_of(target, text), abs=CLOSE), text
    assert found.accepted == pytest.approx(round_of("rejection", "one-hot", stops).accepted, abs=CLOSE)


@dataclass(frozen=True)
class Tables:
    """Another way to the law of an answer: in a draft tokens have the law v, behind its first fall the law p."""

    draft: Laws
    weight: float

    def law(self, text: Text, at: int = 0, drafting: bool = True) -> float:
        if at == len(text):
            return 1.0
        p, q = target(text[:at]).double(), self.draft(text[:at]).double()
        if not drafting:
            return float(p[text[at]]) * self.law(text, at + 1, False)
        v = self.weight * p + (1 - self.weight) * q
        stands, falls = float(torch.minimum(q, v)[text[at]]), float((v - q).clamp(min=0)[text[at]])
        return stands * self.law(text, at + 1) + falls * self.law(text, at + 1, False)


@pytest.mark.parametrize("weight", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("draft", ["one after another", "each alone", "tempered"])
def test_answers_of_the_ensemble_mix_while_a_draft_lasts(draft: str, weight: float) -> None:
    laws = DRAFTS[draft]
    found = written(EnsembleVerifier(), target, laws, knobs={"target_weight": weight})
    tables = Tables(laws, weight)
    for text, chance in found.law.items():
        assert chance == pytest.approx(tables.law(text), abs=CLOSE), text
    expected = sum(min_product(laws, text, weight) for text in PREFIXES)
    assert found.accepted == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize("name", ["bounded", "lenient", "typical", "top_k_gap"])
def test_relaxed_verifiers_accept_more_of_a_chain(name: str) -> None:
    found = written(made(name), target, alone, knobs=KNOBS[name])
    assert sum(found.law.values()) == pytest.approx(1, abs=CLOSE)
    assert found.accepted > round_of("rejection", "each alone").accepted + 0.02


def test_single_tokens_are_verified_alike() -> None:
    one = written(RejectionVerifier(), target, chained, width=1)
    block = written(BlockVerifier(), target, chained, width=1, others=HIGH)
    assert one.accepted == block.accepted and one.law == block.law
