"""The C code that says how sure rows of logits are, called from Python; see `certainty.py`."""

from __future__ import annotations

from struct import Struct

import numpy as np
import torch
from torch import Tensor

from engine.kernels.native import Library

CERTAINTY = Struct("@3P3q2i")  # the struct of certainty.c, field for field


def certainty(library: Library, scores: Tensor, tokens: Tensor) -> Tensor:
    """[3, rows] float64: all of `certainty.MEASURES`; scores must fit as those of `native_choose`."""
    rows, width = scores.shape
    assert tokens.shape == (rows,) and tokens.dtype is torch.int64
    chosen = tokens.contiguous()
    assert not rows or (int(chosen.min()) >= 0 and int(chosen.max()) < width)
    out = np.empty((3, rows))
    library.certainty_of(
        CERTAINTY.pack(
            scores.data_ptr(),
            chosen.data_ptr(),
            out.ctypes.data,
            scores.stride()[0],
            rows,
            width,
            torch.get_num_threads(),
            0,
        )
    )
    return torch.from_numpy(out)
