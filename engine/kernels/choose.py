"""A token for every row of logits: the largest, or the one that wins with Gumbel noise added.

The C code knows that noise, a function of a row's key, bit for bit but for the last digits of two logarithms. It says
of every row whether these could matter; so a caller that draws the unsure rows itself (a few in ten thousand) gets
exactly the tokens that it would have drawn alone. The twin is sure of greedy rows only.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.kernels import native_choose
from engine.kernels.library import library
from engine.kernels.native_choose import Chosen, Keys, Wishes


def usable(logits: torch.Tensor) -> bool:
    """Does the C code take these? Where not, drawn rows are all unsure."""
    return native_choose.fits(logits) and library() is not None


def choose(
    logits: torch.Tensor, keys: Keys | None = None, wishes: Wishes | None = None, *, second: bool = False
) -> Chosen:
    """logits [n, V] float32 -> n tokens, the lowest id on ties; a NaN counts as largest.

    `wishes` [n, 5] float64 are temperature (0: the largest logit), least score (after temperature and shift to a
    largest of 0; -inf: none), top_p (1: off), top_k (0: off, else below V), and the sum of exp(score) from the least
    one on (0: unknown), of which top_p without top_k takes its part; None is greedy throughout. `keys` [n, 5] uint64
    are seed, choice, position, purpose and step of the draws. Rows whose largest is not finite are greedy.
    """
    if native_choose.fits(logits) and (found := library()) is not None:
        return native_choose.choose(found, logits, keys, wishes, second=second)
    return reference(logits, wishes, second=second)


def reference(logits: torch.Tensor, wishes: Wishes | None = None, *, second: bool = False) -> Chosen:
    """The twin."""
    host = logits.detach().cpu().numpy()
    tokens = host.argmax(axis=1)
    largest = np.take_along_axis(host, tokens[:, None], 1)[:, 0]
    others = None
    if second:
        rest = host.copy()
        np.put_along_axis(rest, tokens[:, None], -np.inf, 1)
        others = np.where(np.isnan(largest), largest, rest.max(axis=1))
    unsure = np.zeros(len(tokens), dtype=np.uint8)
    if wishes is not None:
        unsure[:] = (wishes[:, 0] > 0) & np.isfinite(largest)
    return Chosen(tokens, largest, others, unsure)
