"""How sure rows are, by native code, against torch's softmax in double precision."""

from __future__ import annotations

import math

import pytest
import torch

from engine.kernels import native_certainty, reference
from engine.kernels.certainty import MEASURES
from engine.kernels.native import Library
from tests.numeric.native_kernels import VARIANTS, build


@pytest.fixture(params=VARIANTS)
def library(request: pytest.FixtureRequest) -> Library:
    return build(request.param)


@pytest.mark.parametrize("width", [1, 2, 15, 257, 1024, 3001])
@pytest.mark.parametrize("scale", [0.01, 2.0, 40.0])
def test_measures_are_those_of_a_softmax(library: Library, width: int, scale: float) -> None:
    random = torch.Generator().manual_seed(width)
    logits = (scale * torch.randn(9, width + 3, generator=random))[:, :width]  # rows lie apart
    logits[1, 1:] = -math.inf
    logits[2, -1] = logits[2, 0]
    tokens = torch.randint(width, (9,), generator=random)
    ours, twin = native_certainty.certainty(library, logits, tokens), reference.certainty(logits, tokens, MEASURES)
    for name, row in zip(MEASURES, ours, strict=True):
        torch.testing.assert_close(row, twin[name], rtol=1e-12, atol=1e-14)


def test_rows_that_are_no_laws_have_no_numbers_and_spoil_no_others(library: Library) -> None:
    logits, tokens = torch.randn(5, 100, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 1, 4, 1, 5])
    clean = native_certainty.certainty(library, logits, tokens)
    logits[1], logits[2, 99], logits[3, 0] = -math.inf, math.nan, math.inf
    spoiled = native_certainty.certainty(library, logits, tokens)
    assert spoiled[:, 1:4].isnan().all() and torch.equal(spoiled[:, [0, 4]], clean[:, [0, 4]])


def test_a_row_does_not_depend_on_the_others_or_on_threads(library: Library) -> None:
    logits = torch.randn(40, 2000, generator=torch.Generator().manual_seed(1))
    tokens = logits.argmax(1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = native_certainty.certainty(library, logits, tokens)
    finally:
        torch.set_num_threads(before)
    for row in range(40):
        alone = native_certainty.certainty(library, logits[row : row + 1], tokens[row : row + 1])
        assert torch.equal(alone[:, 0], together[:, row])
