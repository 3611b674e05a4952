"""The C code that chooses a token for every row of logits, called from Python; see `choose.py`."""

from __future__ import annotations

from itertools import pairwise
from struct import Struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from engine.kernels.native import Library

# The structs of choose.c, field for field.
CHOOSE = Struct("@7P3q2i")
NOISE = Struct("@3Pq")

Keys = npt.NDArray[np.uint64]
Wishes = npt.NDArray[np.float64]


class Chosen(NamedTuple):
    """One entry per row, on the host. Where a row is `unsure` its token is none: somebody has to draw it exactly."""

    tokens: npt.NDArray[np.int64]
    largest: npt.NDArray[np.float32]  # NaN where the row holds one
    second: npt.NDArray[np.float32] | None  # the largest but one, where it was asked for; equal where two tie
    unsure: npt.NDArray[np.uint8]


def fits(logits: torch.Tensor) -> bool:
    """Whether the C code can take these."""
    return (
        logits.dtype is torch.float32
        and logits.is_cpu
        and logits.ndim == 2
        and logits.stride()[1] == 1
        and logits.shape[1] > 0
        and not (logits.requires_grad and torch.is_grad_enabled())
    )


def choose(
    library: Library, logits: torch.Tensor, keys: Keys | None, wishes: Wishes | None, *, second: bool = False
) -> Chosen:
    """See `choose.choose`; logits must fit."""
    rows, width = logits.shape
    for table, size, kind in ((keys, 5, np.uint64), (wishes, 5, np.float64)):
        assert table is None or (table.shape == (rows, size) and table.dtype == kind and table.flags.c_contiguous)
    assert wishes is None or keys is not None
    # One buffer: what addresses take of a few microseconds is most of it.
    buffer = np.empty(rows * 17, dtype=np.uint8)
    start, places = buffer.ctypes.data, [0, 8 * rows, 12 * rows, 16 * rows, 17 * rows]
    library.choose_tokens(
        CHOOSE.pack(
            logits.data_ptr(),
            0 if keys is None else keys.ctypes.data,
            0 if wishes is None else wishes.ctypes.data,
            *(start + place for place in places[:4]),
            logits.stride()[0],
            rows,
            width,
            torch.get_num_threads(),
            0,
        )
    )
    tokens, largest, others, unsure = (buffer[begin:end] for begin, end in pairwise(places))
    found = others.view(np.float32) if second else None
    return Chosen(tokens.view(np.int64), largest.view(np.float32), found, unsure)


def noise(library: Library, key: Keys, count: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32]]:
    """Bits and noise of the first `count` lanes, a multiple of 16, as `choose` sees them; key [5] as in its keys."""
    assert key.shape == (5,) and key.dtype == np.uint64 and count % 16 == 0
    bits, found = np.empty(count, dtype=np.uint32), np.empty(count, dtype=np.float32)
    library.choose_noise_of(NOISE.pack(key.ctypes.data, bits.ctypes.data, found.ctypes.data, count))
    return bits, found
