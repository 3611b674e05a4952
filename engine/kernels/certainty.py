"""How sure rows of logits are of a token, in double precision: C code where it stands, torch elsewhere."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from engine.kernels import native_certainty, native_choose, reference
from engine.kernels.library import library

MEASURES = ("probability", "margin", "entropy")  # in the order in which the C code gives them


def certainty(scores: Tensor, tokens: Tensor, measures: Iterable[str]) -> dict[str, Tensor]:
    """[rows] float64 each, by name: the tokens' probability, and what else is asked for of MEASURES.

    scores [rows, V] float32, tokens [rows] int64. The margin is between the best two probabilities, the entropy is
    negative: sum of p log p. A row comes out the same whatever stands in the others; NaN where it is no law.
    """
    if native_choose.fits(scores) and (found := library()) is not None:
        every = native_certainty.certainty(found, scores, tokens)
        return {name: every[row] for row, name in enumerate(MEASURES) if name in ("probability", *measures)}
    return reference.certainty(scores, tokens, measures)
