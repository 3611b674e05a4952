"""Drafting and verifying by laws on a CUDA device: the numbers, tokens and verdicts of the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.pipelines.coins import Coins, RequestSampler
from engine.protocols import Delta, Dense, DraftProposal, Scalar, TargetRows
from engine.registry import VERIFIERS
from engine.runtime.rng import Draw, Purpose, uniform_rows
from tests.enumeration import KNOBS, made
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


def rows(name: str, log_probs: Tensor, chosen: bool, coins: Coins) -> TargetRows:
    """One row has no law; the last three requests are greedy where tokens were chosen, and a relaxed rule minds it."""
    n, device = len(log_probs), log_probs.device
    draws = log_probs.argmax(-1)
    draws[3, 2] = -1
    log_probs[3, 2] = float("nan")
    knobs = {
        knob: torch.full((n,), value, dtype=torch.float64, device=device) for knob, value in KNOBS.get(name, {}).items()
    }
    requests = torch.arange(n, device=device)
    free = (requests % 4 > 0).unsqueeze(1) | (torch.arange(WIDTH, device=device) > 2)
    greedy = requests >= n - 3 if chosen else None
    rows_states = torch.zeros(n, WIDTH + 1, 1, device=device)
    return TargetRows(draws, log_probs, coins, knobs, greedy, free, rows_states)


@pytest.mark.parametrize("name", [name for name in VERIFIERS if name != "strict"])
@pytest.mark.parametrize("drawn", [True, False])
def test_drafts_and_verdicts_are_those_of_the_cpu(drawn: bool, name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = 2 * torch.randn(REQUESTS * WIDTH, VOCAB, generator=generator)
    near = logits.view(REQUESTS, WIDTH, VOCAB) + 0.7 * torch.randn(REQUESTS, WIDTH, VOCAB, generator=generator)
    near[torch.rand(near.shape, generator=generator) < 0.1] = float("-inf")  # what the target bans
    after = torch.randn(REQUESTS, 1, VOCAB, generator=generator)
    log_probs = torch.cat((near, after), dim=1).mul_(1.0 if drawn else 4.0).log_softmax(-1)
    said = torch.rand(REQUESTS, WIDTH, 1, generator=generator)
    asking = [*states(REQUESTS // 2, top_k=50, top_p=0.9), *states(REQUESTS // 2, temperature=0.8)]
    asks = [row for row in range(REQUESTS) for _ in range(WIDTH)]
    found, biases = [], []
    for device in DEVICES:
        sampler = RequestSampler(asking) if drawn else None
        tokens, laws = logits.argmax(1).to(device), logits.to(device).softmax(1)
        if sampler is not None:
            tokens, laws = sampler.draw(logits.to(device), asks, list(range(WIDTH)) * REQUESTS)
        tokens, laws = tokens.view(REQUESTS, WIDTH), laws.view(REQUESTS, WIDTH, VOCAB)
        thought = Scalar(laws.gather(2, tokens.unsqueeze(2)).squeeze(2))
        law = Dense(laws) if drawn else Delta()
        proposal = DraftProposal(tokens, (WIDTH,) * REQUESTS, law, thought, said.to(device))
        target = rows(name, log_probs.to(device, copy=True), not drawn, Coins(asking, WIDTH, device))
        verdict = made(name).verify(proposal, target)
        found.append([tensor.cpu() for tensor in (tokens, verdict.accepted, verdict.path, verdict.next_token)])
        biases.append(None if verdict.bias is None else verdict.bias.cpu())
    assert all(torch.equal(here, there) for here, there in zip(*found, strict=True))
    assert 0 < int(found[0][1].sum()) < REQUESTS * WIDTH
    here, there = biases
    assert (here is None) == (there is None) == (name in ("rejection", "block"))
    if here is not None and there is not None:
        assert torch.allclose(here, there, rtol=0, atol=1e-5) and bool((here > 0).any())
