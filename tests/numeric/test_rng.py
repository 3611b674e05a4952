"""Philox against published answers and numpy, and the noise that is made from it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.runtime import rng
from engine.runtime.rng import (
    Draw,
    Purpose,
    bits_at,
    bits_numpy,
    bits_torch,
    gumbel,
    gumbel_at,
    gumbel_rows,
    uniform_rows,
)
from tests.numeric.sampler_reference import chi_square, chi_square_limit

# Random123's kat_vectors, "philox4x64 10": counter words, key words, output words.
KNOWN = [
    "0 0 0 0  0 0  16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b",
    "ffffffffffffffff ffffffffffffffff ffffffffffffffff ffffffffffffffff  ffffffffffffffff ffffffffffffffff"
    "  87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0",
    "243f6a8885a308d3 13198a2e03707344 a4093822299f31d0 082efa98ec4e6c89  452821e638d01377 be5466cf34e90c6c"
    "  a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
]
WORDS = st.integers(-(2**63), 2**64 - 1)
DRAWS = st.builds(Draw, WORDS, WORDS, WORDS, st.integers(0, 9), st.integers(0, 2**40))


def signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def as_int64(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.astype(np.int64))


@pytest.mark.parametrize("line", KNOWN)
def test_twin_gives_the_published_answers(line: str) -> None:
    c0, c1, c2, c3, k0, k1, *answer = (signed(int(word, 16)) for word in line.split())
    fields = torch.tensor([k0, k1, c1, c2, c3]).unsqueeze(-1)
    words = rng.philox(torch.tensor([c0]), fields)
    assert [int(word) for word in words] == answer


def test_numpy_rows_start_with_the_published_answer() -> None:
    lanes = bits_numpy([Draw(0, 0, 0, 0, 0)], 8)[0].tolist()
    words = [low | high << 32 for low, high in zip(lanes[::2], lanes[1::2], strict=True)]
    assert words == [int(word, 16) for word in KNOWN[0].split()[6:]]


@given(st.lists(DRAWS, min_size=1, max_size=4), st.integers(1, 70))
def test_twin_equals_numpy(draws: list[Draw], n: int) -> None:
    expected = as_int64(bits_numpy(draws, n))
    assert torch.equal(bits_torch(draws, n, "cpu"), expected)
    rows, lanes = torch.ones_like(expected).nonzero(as_tuple=True)
    assert torch.equal(bits_at(draws, rows, lanes), expected.flatten())


def test_a_lane_does_not_depend_on_the_number_of_lanes() -> None:
    draw = Draw(7, 0, 12)
    long = bits_numpy([draw], 50_000)[0]
    for n in (1, 2, 7, 8, 9, 4097):
        assert np.array_equal(bits_numpy([draw], n)[0], long[:n])
    lanes = torch.tensor([49_999, 0, 31, 49_992])
    assert torch.equal(bits_at([draw], torch.zeros(4, dtype=torch.int64), lanes), as_int64(long[lanes.numpy()]))


def test_seeds_are_taken_modulo_two_to_the_64() -> None:
    for seed, same in ((-1, 2**64 - 1), (-(2**63), 2**63), (5, 2**64 + 5), (5, 2**90 + 5)):
        assert np.array_equal(bits_numpy([Draw(seed, 0, 3)], 16), bits_numpy([Draw(same, 0, 3)], 16))
        assert torch.equal(bits_torch([Draw(seed, 0, 3)], 16, "cpu"), bits_torch([Draw(same, 0, 3)], 16, "cpu"))


@given(st.lists(DRAWS, min_size=1, max_size=4), st.integers(1, 9))
def test_uniforms_are_made_of_the_first_word_of_their_position_and_step(draws: list[Draw], n: int) -> None:
    got = uniform_rows(draws, n, "cpu")
    assert got.dtype == torch.float64
    assert torch.equal(uniform_rows(draws * 64, n, "cpu")[: len(draws)], got)  # by the torch twin: they are many
    for row, draw in enumerate(draws):
        for step in range(n):
            low, high = bits_numpy([draw._replace(position=draw.position + step, step=draw.step + step)], 2)[0].tolist()
            assert got[row, step].item() == (2 * ((low | high << 32) >> 12) + 1) / 2**53


def test_uniforms_are_uniform_and_never_0_or_1() -> None:
    found = uniform_rows([Draw(seed, 0, 3, Purpose.ACCEPT) for seed in range(500)], 100, "cpu").flatten()
    assert ((found > 0) & (found < 1)).all() and len(found.unique()) == len(found)
    statistic, degrees = chi_square((found * 50).long().bincount(minlength=50).tolist(), [0.02] * 50)
    assert statistic < chi_square_limit(degrees)
    ends = torch.tensor([0, rng._FRACTION])  # of the 52 bits
    assert ((ends * 2 + 1).double() * 2.0**-53).tolist() == [2.0**-53, 1 - 2.0**-53]


def test_noise_follows_its_formula_and_is_finite_at_the_ends() -> None:
    bits = torch.tensor([0, 1, 1000, 2**24 + 1, 2**31, 2**32 - 2**12])
    expected = [-math.log(-math.log1p(-(k + 0.5) / 2**32)) for k in bits.tolist()]
    assert rng.gumbel_of_bits(bits).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    lowest, highest = rng.gumbel_of_bits(torch.tensor([2**32 - 1, 0])).tolist()
    assert lowest == pytest.approx(-math.log(24 * math.log(2)), rel=1e-6)
    assert highest == pytest.approx(33 * math.log(2), rel=1e-6)
    unsigned = torch.from_numpy(np.array([2**32 - 1, 2**31 + 5, 3], dtype=np.uint32))
    assert torch.equal(rng.gumbel_of_bits(unsigned), rng.gumbel_of_bits(unsigned.long()))


def test_one_row_many_rows_and_single_lanes_agree_bit_for_bit() -> None:
    draws = [Draw(seed, seed % 3, 10 + seed, Purpose.DRAFT, step=2) for seed in range(-8, 9)]
    noise = gumbel_rows(draws, 49_152, "cpu")
    assert noise.dtype == torch.float32 and noise.isfinite().all()
    for draw, alone in zip(draws, noise, strict=True):
        seed, choice, position, purpose, step = draw
        assert torch.equal(gumbel(seed, choice, position, purpose, 49_152, "cpu", step), alone)
    rows, lanes = torch.tensor([0, 16, 16, 3, 0]), torch.tensor([0, 49_151, 7, 40_000, 1])
    assert torch.equal(gumbel_at(draws, rows, lanes), noise[rows, lanes])


def test_every_field_gives_unrelated_noise() -> None:
    n = 20_000
    base = Draw(seed=11, choice=0, position=5, purpose=Purpose.TARGET, step=0)
    others = [base._replace(**{field: value}) for field in base._fields for value in (1, 2, 3)]
    others += [base._replace(purpose=purpose) for purpose in Purpose if purpose != Purpose.TARGET]
    noise = gumbel_rows([base, *dict.fromkeys(others)], n, "cpu").double()
    assert len(noise) == 1 + 3 * len(base._fields) + len(Purpose) - 4  # purposes 1 to 3 came twice
    correlations = torch.corrcoef(noise) - torch.eye(len(noise))
    assert correlations.abs().max() < 5 / math.sqrt(n)


def test_noise_has_the_moments_of_a_gumbel() -> None:
    noise = gumbel_rows([Draw(3, 0, position) for position in range(20)], 50_000, "cpu").double()
    deviation = math.pi / math.sqrt(6)
    assert abs(float(noise.mean()) - 0.5772156649) < 5 * deviation / math.sqrt(1e6)
    assert abs(float(noise.var()) / deviation**2 - 1) < 5 * math.sqrt(4.4 / 1e6)  # excess kurtosis 2.4


def test_the_argmax_over_positions_follows_the_law() -> None:
    law = [0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.009, 0.001]
    noise = gumbel_rows([Draw(2024, 1, position) for position in range(30_000)], len(law), "cpu")
    drawn = (torch.tensor(law).log() + noise).argmax(1)
    statistic, degrees = chi_square(drawn.bincount(minlength=len(law)).tolist(), law)
    assert statistic < chi_square_limit(degrees)
