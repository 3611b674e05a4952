"""The native choice of tokens against the torch path of the sampler, which draws exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from engine.kernels import choose, native_choose
from engine.kernels.native import Library
from engine.runtime import sampler
from engine.runtime.rng import Draw, Purpose, bits_numpy, gumbel_of_bits
from engine.runtime.sampler import Sampler
from engine.runtime.sampling_layout import Layout
from tests.numeric.native_kernels import VARIANTS, build
from tests.numeric.sampler_reference import state

NAN, INF = math.nan, math.inf
CPU = torch.device("cpu")


@pytest.fixture(params=VARIANTS)
def library(request: pytest.FixtureRequest) -> Library:
    return build(request.param)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def normal(rows: int, width: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 31, 33, 1023, 1024, 1025, 2100, 49_152])
def test_the_largest_and_the_next(library: Library, width: int) -> None:
    logits = normal(7, width + 5, seed=width)[:, :width]  # rows lie apart
    logits[1] = logits[1].round()  # ties
    logits[2] = -INF
    logits[3, width // 2] = INF
    logits[4, width - 1] = logits[4, 0] = 99.0
    logits[5, width // 3] = NAN
    logits[5, width - 1] = NAN
    logits[6] = -0.0
    logits[6, -1] = 0.0
    ours = native_choose.choose(library, logits, None, None, second=True)
    twin = choose.reference(logits, second=True)
    for mine, theirs in zip(ours, twin, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert not ours.unsure.any()


def test_noise_has_the_bits_of_philox_and_its_logarithms_to_one_part_in_a_million(library: Library) -> None:
    worst = 0.0
    for draw in (Draw(0, 0, 0), Draw(-5, 3, 10**12, Purpose.DENOISE, 7), Draw(2**63 - 1, 1, 4, 6, 2**40)):
        key = np.array([part % 2**64 for part in draw], dtype=np.uint64)
        bits, noise = native_choose.noise(library, key, 1 << 17)
        np.testing.assert_array_equal(bits, bits_numpy([draw], 1 << 17)[0])
        worst = max(worst, float((torch.from_numpy(noise) - gumbel_of_bits(torch.from_numpy(bits))).abs().max()))
    assert worst < 3e-6  # the code counts on 1e-5 and is unsure below 1e-4


MIXES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 5.0},
    {"temperature": 1e-4},
    {"temperature": 0.8, "top_k": 1},
    {"temperature": 0.8, "top_k": 40},
    {"temperature": 1.3, "top_k": 3000},
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 1.5, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.0},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "min_p": 1e-6},
    {"temperature": 1.0, "min_p": 1e-4, "top_p": 0.7},
    {"temperature": 0.9, "top_k": 50, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 1.0, "top_k": 10**6},
]


@pytest.mark.parametrize("width", [9, 300, 6001])
def test_sure_rows_have_the_tokens_of_the_exact_draw(library: Library, width: int) -> None:
    rows, unsure, drawn = 8 * len(MIXES), 0, 0
    for round_ in range(2):
        logits = normal(rows, width, (1.5, 5.0)[round_], seed=width + round_)
        logits[::5] = (logits[::5] * 2).round() / 2  # ties at every border
        logits[::7, width // 2 :] = -INF
        states = [
            state(seed=row * 7919 - 40 * round_, choice=row % 3, **MIXES[row % len(MIXES)]) for row in range(rows)
        ]
        layout = Layout(states, width, CPU)
        exact, failed = sampler._draw(logits, layout)
        assert not failed.any()
        ours = native_choose.choose(library, logits, layout.keys(), layout.wishes)
        sure = ours.unsure == 0
        cut = (layout.wishes[:, 2] < 1) & (layout.wishes[:, 3] == 0)  # depends on a sum that is not known here
        np.testing.assert_array_equal(ours.tokens[sure], exact.numpy()[sure])
        unsure += int((~sure & ~cut).sum())
        drawn += rows
        assert Sampler(width).sample(logits, states).tokens.tolist() == exact.tolist()
    assert unsure < 0.02 * drawn


def test_unsure_rows_are_drawn_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = normal(40, 500)
    states = [state(seed=row, **MIXES[row % len(MIXES)]) for row in range(40)]
    exact, _ = sampler._draw(logits, Layout(states, 500, CPU))
    assert Sampler(500).sample(logits, states).tokens.tolist() == exact.tolist()
    real = sampler.choose

    def doubtful(logits: torch.Tensor, keys: native_choose.Keys | None = None, *args: Any) -> native_choose.Chosen:
        chosen = real(logits, keys, *args)
        if keys is None:  # the exact draw itself
            return chosen
        chosen.unsure[1::2] = 1
        chosen.tokens[1::2] = 0
        return chosen

    monkeypatch.setattr(sampler, "choose", doubtful)
    assert Sampler(500).sample(logits, states).tokens.tolist() == exact.tolist()


def test_rows_without_numbers_are_greedy_and_sure(library: Library) -> None:
    logits = normal(3, 100)
    logits[0, 5], logits[1], logits[2, 7] = NAN, -INF, INF
    layout = Layout([state(seed=1)] * 3, 100, CPU)
    ours = native_choose.choose(library, logits, layout.keys(), layout.wishes)
    assert ours.tokens.tolist() == [5, 0, 7] and not ours.unsure.any()
    assert not np.isfinite(ours.largest).any()


def test_the_twin_is_sure_of_greedy_rows_only() -> None:
    logits = normal(3, 50)
    layout = Layout([state(temperature=0.0), state(seed=2), state(seed=3, top_k=4)], 50, CPU)
    assert choose.reference(logits, layout.wishes).unsure.tolist() == [0, 1, 1]
