"""dual_diffusion against plain loops over a network of the test's own: every rule of verifying, every kind of drafter.

All settings of a kind run in one batch, each request beside others that are elsewhere; so what they come to alone is
what they come to together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from engine.diffusion import VERIFIES
from engine.types import Request
from tests.numeric.dual_drive import Outcome, pipeline, request, run, runner
from tests.numeric.dual_reference import MASK, Answer, Plain, Reference, Setting, tiny_llama

PROMPTS: tuple[tuple[int, ...], ...] = ((3, 1, 4, 1, 5, 9), (2, 7), (1, 6, 1, 8, 0, 3, 3, 9, 8, 8, 7))
KINDS = {
    "same": Setting(),
    "same, shifted": Setting(shift=True),
    "full drafter": Setting(),
    "full drafter, shifted": Setting(draft_shift=True),
    "block-causal drafter": Setting(unit=4),
    "block-causal drafter, shifted": Setting(unit=8, sub_block=4, draft_shift=True),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def served() -> LlamaForCausalLM:
    return tiny_llama(0)


@pytest.fixture(scope="module")
def drafter(served: LlamaForCausalLM) -> LlamaForCausalLM:
    """Somewhat like the served model, so that some of its tokens stand."""
    other = tiny_llama(1)
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), served.parameters(), strict=True):
            mine.copy_(0.25 * mine + 0.97 * theirs)
    return other


def settings(kind: str) -> list[tuple[tuple[int, ...], Setting]]:
    """Prompts with all that a request may choose, and canvases that end inside a block."""
    base = KINDS[kind]
    verifies = [verify for verify in VERIFIES if verify != "masked_copy" or not base.shift]
    found = []
    for number, (verify, temperature) in enumerate(itertools.product(verifies, (0.0, 0.8))):
        sure = replace(base, threshold=(0.4, 0.7)[number % 2], least=(0.5, 0.1, 0.3)[number % 3])
        changes = replace(sure, verify=verify, temperature=temperature, seed=number, steps=1 + number % 4)
        found.append((PROMPTS[number % 3], replace(changes, canvas=(8, 6, 11)[number % 3])))
    slow = replace(base, threshold=2.0, steps=9, least=0.0, canvas=11)  # verify steps that change nothing
    return [*found, (PROMPTS[2], slow), (PROMPTS[0], replace(slow, block=3))]


def equal(got: Outcome, want: Answer) -> None:
    assert got.error is None
    assert got.tokens == want.tokens
    passes = got.passes
    assert (passes.forwards, passes.draft_forwards) == (want.forwards, want.draft_forwards)
    assert (passes.positions, passes.draft_positions) == (want.positions, want.draft_positions)
    assert (passes.verifies, passes.remasked) == (want.verifies, want.remasked)
    assert MASK not in got.tokens
    assert [entry.token_id for entry in got.logprobs] == want.tokens


@pytest.mark.parametrize("kind", KINDS)
def test_batched_alone_and_as_the_reference(kind: str, served: LlamaForCausalLM, drafter: LlamaForCausalLM) -> None:
    base = KINDS[kind]
    own = not kind.startswith("same")
    pipe = pipeline(runner(served), runner(drafter) if own else None, base)
    asked: list[Request] = []
    wants: list[Answer] = []
    for number, (prompt, setting) in enumerate(settings(kind)):
        asked.append(request(f"r{number}", prompt, setting, logprobs=1))
        wants.append(Reference(Plain(served), Plain(drafter) if own else None, prompt, setting).decode())
    together, _ = run(pipe, asked)
    for one, want in zip(asked, wants, strict=True):
        equal(together[one.id], want)
        reported = [math.exp(entry.logprob) for entry in together[one.id].logprobs]
        assert reported == pytest.approx(want.chances, rel=1e-3)
    for one, want in list(zip(asked, wants, strict=True))[2::5]:
        equal(run(pipe, [one])[0][one.id], want)
    assert sum(want.remasked for want in wants) > 4 and sum(want.verifies for want in wants) > 5
