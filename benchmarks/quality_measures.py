"""How far one distribution over tokens is from another, and where two greedy answers part. See `benchmarks.quality`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.quality_texts import Window
from engine.runtime.batch import SeqInput
from engine.runtime.kv_cache import PagedKVCache
from engine.runtime.loading import LoadedModel
from engine.runtime.runner import ModelRunner

BLOCK = 16
CHUNK = 128  # tokens fed at once: logits of so many rows are held twice


@dataclass
class Reading:
    """Sums over the positions of a text, each with the token that follows there; natural logarithms."""

    positions: int = 0
    surprise: float = 0.0  # -log p of the true next token
    reference_surprise: float = 0.0  # the same for the reference
    divergence: float = 0.0  # KL(reference, this)
    worst: float = 0.0  # largest divergence of one position
    same: int = 0  # positions with the reference's most likely token

    def add(self, reference: torch.Tensor, logits: torch.Tensor, following: torch.Tensor) -> None:
        """Log-probabilities are formed here: reference and logits [n, V] fp32, following [n] int64."""
        wanted, found = reference.log_softmax(-1), logits.log_softmax(-1)
        divergence = (wanted.exp() * (wanted - found)).sum(-1).double()
        self.positions += len(following)
        self.surprise -= float(found.gather(1, following[:, None]).double().sum())
        self.reference_surprise -= float(wanted.gather(1, following[:, None]).double().sum())
        self.divergence += float(divergence.sum())
        self.worst = max(self.worst, float(divergence.max()))
        self.same += int((wanted.argmax(-1) == found.argmax(-1)).sum())

    def figures(self) -> dict[str, float]:
        """Perplexities, the mean and the largest divergence in nats, and the share of equal first choices."""
        count = self.positions
        perplexity, reference = math.exp(self.surprise / count), math.exp(self.reference_surprise / count)
        return {
            "positions": count,
            "perplexity": perplexity,
            "perplexity_change": perplexity / reference - 1,
            "divergence": self.divergence / count,
            "worst_divergence": self.worst,
            "same_argmax": self.same / count,
        }


class Reader:
    """A loaded model that reads windows from their first token, in chunks, over a pool of its own."""

    def __init__(self, loaded: LoadedModel, length: int, kv_dtype: torch.dtype) -> None:
        blocks = -(-length // BLOCK)
        cache = PagedKVCache(loaded.shapes, blocks, BLOCK, kv_dtype, loaded.placement.device)
        self._runner = ModelRunner(loaded.adapter, cache, loaded.attention)
        self._blocks = list(range(blocks))

    def logits(self, ids: Sequence[int], start: int, end: int) -> torch.Tensor:
        """fp32 [end - start, V] of the tokens [start, end); everything before must have been read."""
        with torch.inference_mode():
            fed = SeqInput(list(ids[start:end]), start, self._blocks, end)
            return self._runner.forward([fed], range(end - start))


def read(reference: Reader, others: Sequence[Reader], windows: Sequence[Window]) -> list[dict[str, Reading]]:
    """All read every window side by side; for each of the others sums by source, and over everything under ""."""
    found: list[dict[str, Reading]] = [{"": Reading()} for _ in others]
    for window in windows:
        ids = torch.tensor(window.ids)
        for start in range(0, len(ids) - 1, CHUNK):
            end = min(start + CHUNK, len(ids) - 1)  # nothing follows the last one
            wanted = reference.logits(window.ids, start, end)
            for readings, other in zip(found, others, strict=True):
                logits = other.logits(window.ids, start, end)
                for name in ("", window.source):
                    readings.setdefault(name, Reading()).add(wanted, logits, ids[start + 1 : end + 1])
    return found


def parting(wanted: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> dict[str, float]:
    """Greedy answers beside the reference's: how many are equal, and how far they agree from the start."""
    agreed = [_common(ours, theirs) for ours, theirs in zip(wanted, found, strict=True)]
    equal = sum(len(ours) == len(theirs) == shared for ours, theirs, shared in zip(wanted, found, agreed, strict=True))
    parted = [
        shared
        for ours, theirs, shared in zip(wanted, found, agreed, strict=True)
        if not len(ours) == len(theirs) == shared
    ]
    return {
        "answers": len(agreed),
        "equal": equal,
        "agreed_tokens": sum(agreed) / max(sum(map(len, wanted)), 1),
        "first_difference": float(sorted(parted)[len(parted) // 2]) if parted else -1.0,
    }


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens they share from the start."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
