"""What a grammar leaves of logits on a CUDA device: what it leaves on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.runtime.token_masks import keep_
from engine.structured.vocabulary import Mask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this build of torch finds no CUDA device"),
]


@pytest.mark.parametrize("size", [257, 4096, 5003])
def test_masks_keep_the_same_tokens_on_a_device(size: int) -> None:
    """Vocabularies that are smaller than the masks, and larger."""
    rng = np.random.default_rng(size)
    logits = torch.randn(9, size, generator=torch.Generator().manual_seed(1))
    masks: list[tuple[int, Mask]] = [
        (row, np.packbits(rng.random(4096) < rng.random(), bitorder="little").view(np.uint32)) for row in (7, 0, 3)
    ]
    here, there = logits.clone(), logits.cuda()
    keep_(here, masks)
    keep_(there, masks)
    assert there.is_cuda and torch.equal(here, there.cpu())
