"""Drafting and verifying by laws on a CUDA device: the numbers, tokens and verdicts of the CPU."""

from __future__ import annotations

import pytest
import torch

from engine.pipelines.coins import Coins, RequestSampler
from engine.protocols import Delta, Dense, DraftProposal, TargetRows
from engine.runtime.rng import Draw, Purpose, uniform_rows
from engine.verifiers.rejection import RejectionVerifier
from tests.laws import states

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this build of torch finds no CUDA device"),
]
DEVICES = (torch.device("cpu"), torch.device("cuda", 0))
REQUESTS, WIDTH, VOCAB = 24, 7, 5000


def test_coins_are_equal_bit_for_bit() -> None:
    draws = [Draw(seed, seed % 3, 2**40 + seed, Purpose.ACCEPT) for seed in range(-5, 20)]
    here, there = (uniform_rows(draws, 16, device) for device in DEVICES)
    assert there.device.type == "cuda" and torch.equal(here, there.cpu())


@pytest.mark.parametrize("drawn", [True, False])
def test_drafts_and_verdicts_are_those_of_the_cpu(drawn: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = 2 * torch.randn(REQUESTS * WIDTH, VOCAB, generator=generator)
    near = logits.view(REQUESTS, WIDTH, VOCAB) + 0.7 * torch.randn(REQUESTS, WIDTH, VOCAB, generator=generator)
    after = torch.randn(REQUESTS, 1, VOCAB, generator=generator)
    log_probs = torch.cat((near, after), dim=1).mul_(1.0 if drawn else 4.0).log_softmax(-1)
    draws = log_probs.argmax(-1)
    draws[3, 2] = -1
    asking = [*states(REQUESTS // 2, top_k=50, top_p=0.9), *states(REQUESTS // 2, temperature=0.8)]
    rows = [row for row in range(REQUESTS) for _ in range(WIDTH)]
    found = []
    for device in DEVICES:
        tokens, laws = RequestSampler(asking).draw(logits.to(device), rows, list(range(WIDTH)) * REQUESTS)
        law = Dense(laws.view(REQUESTS, WIDTH, VOCAB)) if drawn else Delta()
        target = TargetRows(draws.to(device), log_probs.to(device), Coins(asking, WIDTH, device))
        proposal = DraftProposal(tokens.view(REQUESTS, WIDTH), (WIDTH,) * REQUESTS, law)
        verdict = RejectionVerifier().verify(proposal, target)
        found.append([tensor.cpu() for tensor in (tokens, verdict.accepted, verdict.path, verdict.next_token)])
    assert all(torch.equal(here, there) for here, there in zip(*found, strict=True))
    assert 0 < int(found[0][1].sum()) < REQUESTS * WIDTH
