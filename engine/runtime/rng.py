"""Randomness as a function: the same (seed, choice, position, purpose, step, lane) always gives the same number.

Philox4x64-10 of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), with
key = (seed, choice) and counter = (lane block, position, purpose, step), the step being a denoise step or a place in a
draft. A block is four 64-bit words, that is eight lanes of 32 bits: lane i is the low (even i) or high (odd i) half of
word (i % 8) // 2 of block i // 8.
For a draw over the vocabulary the lane is the token id, so a token's noise depends on nothing but that.

CPU tensors get their bits from numpy's C generator, others from the torch twin; both give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.runtime.transfer import to_device

LANES = 8  # per block

_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10
_LOW = 0xFFFFFFFF
_FRACTION = (1 << 52) - 1
_POSITION, _STEP = 2, 4  # where Draw holds them
_WORD = 1 << 64
_COUNTER = 1 << 256
_FEW = 64  # single numbers that numpy, set up for each, gives sooner than the torch twin's many small steps
_ROWS_AT_ONCE = 8  # so that the many passes over a row find it in the processor's cache
_LARGEST = 1.0 - 2.0**-24  # the float32 below 1


class Purpose(IntEnum):
    """What a draw is for; different purposes never share a number."""

    TARGET = 0  # the model's own token: plain sampling, the strict verifier and its bonus slot
    DRAFT = 1  # the drafter's token
    ACCEPT = 2  # the coin of a rejection test
    RESIDUAL = 3  # the token that replaces a rejected one
    BONUS = 4  # the token after a fully accepted draft, in verifiers that promise the law only
    DENOISE = 5  # a masked position's token; the step is the denoise step within its block
    ORDER = 6  # the order in which masked positions are committed, where that is random; likewise


class Draw(NamedTuple):
    """One row of randomness; all fields are taken mod 2^64. `position` is the absolute position of the token drawn."""

    seed: int
    choice: int
    position: int
    purpose: int = Purpose.TARGET
    step: int = 0


def gumbel(
    seed: int, choice: int, position: int, purpose: int, n: int, device: torch.device | str, step: int = 0
) -> Tensor:
    """Standard Gumbel noise [n] float32 for lanes 0 to n - 1; finite, between about -2.9 and 22.9."""
    return gumbel_rows([Draw(seed, choice, position, purpose, step)], n, device)[0]


def gumbel_rows(draws: Sequence[Draw], n: int, device: torch.device | str) -> Tensor:
    """Standard Gumbel noise [rows, n] float32: row i is `gumbel` of draws[i]."""
    if torch.device(device).type == "cpu":
        noise = torch.empty(len(draws), n)
        for start in range(0, len(draws), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            noise[part] = gumbel_of_bits(torch.from_numpy(bits_numpy(draws[part], n)))
        return noise
    return gumbel_of_bits(bits_torch(draws, n, device))


def gumbel_at(draws: Sequence[Draw], rows: Tensor, lanes: Tensor) -> Tensor:
    """The entries [rows[i], lanes[i]] of `gumbel_rows`, float32, without making the others."""
    return gumbel_of_bits(bits_at(draws, rows, lanes))


def uniform_rows(draws: Sequence[Draw], n: int, device: torch.device | str) -> Tensor:
    """Uniform numbers in (0, 1), [rows, n] float64: entry j of row i is draws[i] moved on by j positions and j steps.

    They are the odd multiples of 2^-53, made of the upper 52 bits of word 0 of block 0: never 0, never 1, all exact.
    """
    if torch.device(device).type == "cpu" and len(draws) * n <= _FEW:
        moved = ([d._replace(position=d.position + j, step=d.step + j) for j in range(n)] for d in draws)
        words = [[_signed(_generator(draw).random_raw()) for draw in row] for row in moved]
        word = torch.tensor(words, dtype=torch.int64)
    else:
        fields = _fields(draws, device).unsqueeze(-1).repeat(1, 1, n)
        fields[[_POSITION, _STEP]] += torch.arange(n, device=device)
        word = philox(torch.zeros_like(fields[0]), fields)[0]
    return (((word.view(len(draws), n) >> 12) & _FRACTION) * 2 + 1).double().mul_(2.0**-53)


def gumbel_of_bits(bits: Tensor) -> Tensor:
    """-log(-log(1 - v)) float32 with v = (bits + 0.5) / 2^32: small v, where noise is large, keeps its precision."""
    noise = bits.to(torch.float32).mul_(-(2.0**-32)).sub_(2.0**-33)  # -v
    return noise.clamp_(min=-_LARGEST).log1p_().neg_().log_().neg_()


def bits_numpy(draws: Sequence[Draw], n: int) -> npt.NDArray[np.uint32]:
    """[rows, n] random 32-bit lanes."""
    out = np.empty((len(draws), n), dtype=np.uint32)
    for row, draw in enumerate(draws):
        out[row] = _generator(draw).random_raw((n + 1) // 2).astype("<u8", copy=False).view("<u4")[:n]
    return out


def _generator(draw: Draw) -> np.random.Philox:
    """numpy's, about to give word 0 of block 0."""
    seed, choice, *words = (field % _WORD for field in draw)
    counter = sum(word << (64 * place) for place, word in enumerate(words, start=1))
    return np.random.Philox(
        key=np.array([seed, choice], dtype=np.uint64),
        counter=(counter - 1) % _COUNTER,  # numpy increments before each block, the first one too
    )


def bits_torch(draws: Sequence[Draw], n: int, device: torch.device | str) -> Tensor:
    """The twin of `bits_numpy` on any device: [rows, n] int64 in [0, 2^32)."""
    fields = _fields(draws, device).unsqueeze(-1)  # [5, rows, 1]
    blocks = torch.arange((n + LANES - 1) // LANES, device=device).expand(len(draws), -1)
    words = torch.stack(philox(blocks, fields), dim=-1)  # [rows, blocks, 4]
    halves = torch.stack((words & _LOW, (words >> 32) & _LOW), dim=-1)
    return halves.flatten(1)[:, :n]


def bits_at(draws: Sequence[Draw], rows: Tensor, lanes: Tensor) -> Tensor:
    """The lanes [rows[i], lanes[i]] of `bits_torch`, int64 of the shape of `lanes`."""
    fields = _fields(draws, lanes.device).index_select(1, rows)
    words = torch.stack(philox(lanes // LANES, fields), dim=-1)
    word = words.gather(-1, ((lanes % LANES) // 2).unsqueeze(-1)).squeeze(-1)
    return (word >> ((lanes & 1) * 32)) & _LOW


def _fields(draws: Sequence[Draw], device: torch.device | str) -> Tensor:
    """[5, rows] int64: seed, choice, position, purpose, step."""
    rows = [[_signed(field) for field in draw] for draw in draws]
    return to_device([torch.tensor(rows, dtype=torch.int64).T.contiguous()], torch.device(device))[0]


def philox(blocks: Tensor, fields: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four output words of Philox4x64-10, shaped like `blocks` (counter word 0).

    `fields` [5, ...] are the two key words and counter words 1 to 3. All are int64 with the bits of unsigned words.
    """
    key0, key1, c1, c2, c3 = fields.unbind(0)
    c0 = blocks
    for turn in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        round0 = key0 + _signed(turn * _WEYL[0])
        round1 = key1 + _signed(turn * _WEYL[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ round0, low1, high0 ^ c3 ^ round1, low0
    return c0, c1, c2, c3


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 64 bits of the unsigned 128-bit product, by 32-bit halves; every partial sum is below 2^64."""
    low, high = constant & _LOW, constant >> 32
    x_low, x_high = x & _LOW, (x >> 32) & _LOW
    middle = x_low * high + ((x_low * low) >> 32 & _LOW)
    carry = x_high * low + (middle & _LOW)
    return x_high * high + (middle >> 32 & _LOW) + (carry >> 32 & _LOW), x * _signed(constant)


def _signed(value: int) -> int:
    """`value` mod 2^64 as the int64 of the same bits."""
    return (value + (1 << 63)) % _WORD - (1 << 63)
