"""Drawn tokens, bans and biases, log-probabilities and broken logits, at masked positions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from engine.diffusion import BLOCK_CAUSAL, FULL, DiffusionSpec
from engine.kernels import reference as twins
from engine.kernels.certainty import certainty
from engine.pipelines.masked_diffusion import MaskedDiffusionPipeline
from engine.pipelines.states import FAILED
from engine.runtime.batch import AttentionMode, SeqInput
from engine.runtime.rng import Purpose, gumbel
from engine.runtime.runner import ModelRunner
from engine.types import Admission, Request, ScheduledSeq, StepPlan
from tests.denoising import MASK, VOCAB, Rig, all_rules, network, request
from tests.numeric.plain_denoising import Choice, PlainNetwork, State, block_causal, full_attention
from tests.numeric.test_masked_diffusion import one_thread, params, plain

__all__ = ["one_thread", "plain"]
PROMPT = (7, 30, 2, 19, 5, 5)


def drawn(one: Request, spec: DiffusionSpec) -> Choice:
    """The plain sampler's view of a request that draws its tokens with `factor` 1."""
    sampling = one.sampling

    def noise(position: int, step: int) -> np.ndarray:
        found = gumbel(sampling.seed, one.choice, position, Purpose.DENOISE, VOCAB, "cpu", step)
        return found.double().numpy()

    return Choice(
        "factor",
        MASK,
        1.0,
        tempered=spec.tempered,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        noise=noise if sampling.temperature else None,
    )


SPECS = {
    "llada": DiffusionSpec(FULL, MASK),
    "dream": DiffusionSpec(FULL, MASK, shift=True, tempered=True),
    "sdar": DiffusionSpec(BLOCK_CAUSAL, MASK, 8),
    "v2": DiffusionSpec(BLOCK_CAUSAL, MASK, 16, sub_block=8, shift=True, tempered=True),
}


def reference(plain: PlainNetwork, spec: DiffusionSpec, one: Request) -> list[State]:
    how = drawn(one, spec)
    if spec.block_causal:
        args = one.sampling.max_tokens, spec.block_length, how, spec.sub_block, one.diffusion.cache, spec.shift
        return list(block_causal(plain, one.prompt_ids, *args))
    wish = one.diffusion
    return list(full_attention(plain, one.prompt_ids, wish.canvas, wish.block_length, how, wish.cache, spec.shift))


@pytest.mark.parametrize("name", SPECS)
def test_drawn_tokens_are_functions_of_position_and_step(plain: PlainNetwork, name: str) -> None:
    """Seeds, choices, temperatures and top_k beside a greedy request, against draws that the plain sampler makes."""
    spec = SPECS[name]
    wish = params("factor", "dual", spec.block_length if spec.block_causal else 8, 32)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.7, "seed": 3},
        {"temperature": 1.4, "seed": 3, "choice": 1},
        {"temperature": 1.4, "seed": -9, "top_k": 5},
        {},
    ]
    requests = [request(f"r{i}", PROMPT, 32, wish, **kind) for i, kind in enumerate(kinds)]
    got = Rig(spec, network()).run(requests)
    for one in requests:
        expected = reference(plain, spec, one)
        assert got[one.id].states == expected[: len(got[one.id].states)], one.id
        assert len(got[one.id].tokens) == 32
    assert len({tuple(outcome.tokens) for outcome in got.values()}) == len(kinds)


def test_bans_and_biases_hold_at_masked_positions() -> None:
    rig = Rig(DiffusionSpec(FULL, MASK), network())
    wish = params("factor", "dual", 8, 24)

    def tokens(**sampling: Any) -> list[int]:
        return rig.run([request("x", PROMPT, 24, wish, **sampling)])["x"].tokens

    free = tokens()
    favourite = free[2]
    assert favourite not in tokens(bad_words=((favourite,),))
    assert set(tokens(allowed_token_ids=(1, 2, 3, MASK))) <= {1, 2, 3}
    assert set(tokens(logit_bias=((9, 100.0), (MASK, 100.0)))) == {9}
    late = tokens(stop_token_ids=(9,), logit_bias=((9, 100.0),), min_tokens=11)
    assert late.index(9) == 11 and len(late) == 12, "banned where the answer may not end, and only there"
    early = tokens(stop_token_ids=(favourite,))
    assert early == free[: free.index(favourite) + 1]


def test_logprobs_are_those_of_the_step_that_committed(plain: PlainNetwork) -> None:
    rig = Rig(DiffusionSpec(FULL, MASK), network())
    wish = params("factor", "none", 8, 16)
    got = rig.run([request("y", PROMPT[:2], 16, wish), request("x", PROMPT, 16, wish, logprobs=2)])
    states = [{}, *got["x"].states]
    end, size = len(PROMPT) + 16, len(PROMPT)
    assert [entry.token_id for entry in got["x"].logprobs] == got["x"].tokens
    assert not got["y"].logprobs
    for before, after in itertools.pairwise(states):
        canvas = [*PROMPT, *(before.get(i, MASK) for i in range(size, end))]
        logits = plain.run(canvas, 0, [], lambda _: end)
        logits[:, MASK] = -np.inf
        laws = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        for position in after.keys() - before.keys():
            entry = got["x"].logprobs[position - size]
            assert entry.logprob == pytest.approx(laws[position].max(), abs=1e-4)
            assert entry.rank == 1
            best = sorted(range(VOCAB), key=lambda token: -laws[position][token])[:2]
            assert [token for token, _ in entry.top] == best and MASK not in best


class Broken:
    """See `protocols.ForwardRunner`. Says NaN of every input that holds a certain token."""

    def __init__(self, runner: ModelRunner, token: int, value: float) -> None:
        self._runner, self._token, self._value = runner, token, value
        self.vocab_size, self.block_size = runner.vocab_size, runner.block_size
        self.compact, self.forward_with_states = runner.compact, runner.forward_with_states

    def forward(
        self,
        inputs: Sequence[SeqInput],
        rows: Sequence[int],
        mode: AttentionMode = AttentionMode.CAUSAL,
        block: int = 1,
    ) -> torch.Tensor:
        logits = self._runner.forward(inputs, rows, mode, block)
        bad = [self._token in one.ids for one in inputs for _ in one.ids]
        for index, row in enumerate(rows):
            if bad[row]:
                logits[index, 3] = self._value
        return logits


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_end_their_requests_alone(value: float) -> None:
    rig = Rig(DiffusionSpec(FULL, MASK), network())
    wishes = [params(rule, "none", 8, 16) for rule in ("quota", "entropy", "margin", "random", "frechet")]
    sound = [request(wish.rule, PROMPT, 16, wish, bad_words=((46,),)) for wish in wishes]
    expected = rig.run(sound)
    rig.pipeline = MaskedDiffusionPipeline(Broken(rig.runner, 46, value), rig.spec, all_rules())
    bad = [request(f"greedy {wish.rule}", (1, 46), 16, wish) for wish in wishes]
    bad += [request(f"drawn {wish.rule}", (46,), 16, wish, temperature=1.0, top_p=0.9) for wish in wishes]
    got = rig.run([*bad[::2], *sound, *bad[1::2]])
    assert {got[one.id].error for one in bad} == {FAILED}
    for one in sound:
        assert got[one.id].error is None and got[one.id].tokens == expected[one.id].tokens


def test_a_row_without_any_token_ends_its_request_alone() -> None:
    rig = Rig(DiffusionSpec(BLOCK_CAUSAL, MASK, 8), network())
    wish = params("factor", "block", 8, 16)
    got = rig.run([request("x", PROMPT, 16, wish, allowed_token_ids=(MASK,)), request("y", PROMPT, 16, wish)])
    assert got["x"].error == FAILED and not got["x"].tokens
    assert got["y"].error is None and len(got["y"].tokens) == 16


@pytest.mark.parametrize("shift", [False, True])
def test_a_block_opens_from_a_row_that_was_computed_before(shift: bool) -> None:
    """Nothing but the masked block is planned: models that shift feed the row before it once more."""
    spec = DiffusionSpec(BLOCK_CAUSAL, MASK, 8, shift=shift)
    rig = Rig(spec, network())
    one = request("x", (4, 8, 15, 16, 23, 42, 1, 2), 8, params("factor", "block", 8, 8))
    expected = rig.run([one])["x"].states
    blocks, states = (0, 1), []
    plans = [StepPlan(0, (ScheduledSeq("x", 0, one.prompt_ids, 0, blocks),), (Admission(one, ()),))]
    plans += [StepPlan(n, (ScheduledSeq("x", 8, (), 8, blocks),)) for n in range(1, len(expected) + 1)]
    for plan in plans:
        (result,) = rig.pipeline.execute(plan).results
        assert result.num_computed == 8
        canvas = rig.pipeline._table["x"]
        states.append({at: token for at, token in enumerate(canvas.ids) if at >= 8 and token != MASK})
    assert states == [{}, *expected]


@pytest.mark.parametrize("cells", [1, 3 * VOCAB, 10**6])
@pytest.mark.parametrize("measure", [certainty, twins.certainty])
def test_certainty_does_not_hang_on_how_rows_are_cut(
    measure: Callable[..., dict[str, torch.Tensor]], cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(7, VOCAB, generator=torch.Generator().manual_seed(1)) * 4
    logits[2, 5] = -math.inf
    tokens = logits.argmax(1)
    monkeypatch.setattr(twins, "CELLS_ON_CPU", cells)
    found = measure(logits, tokens, {"margin", "entropy"})
    laws = np.exp(logits.double().numpy())
    laws /= laws.sum(1, keepdims=True)
    ordered = np.sort(laws, 1)
    entropy = [sum(p * math.log(p) for p in row if p > 0) for row in laws.tolist()]
    assert found["probability"].numpy() == pytest.approx(ordered[:, -1], rel=1e-12)
    assert found["margin"].numpy() == pytest.approx(ordered[:, -1] - ordered[:, -2], rel=1e-12)
    assert found["entropy"].numpy() == pytest.approx(entropy, rel=1e-12)
    for name, values in found.items():
        assert measure(logits[3:4], tokens[3:4], {"margin", "entropy"})[name] == values[3], "bit for bit"
