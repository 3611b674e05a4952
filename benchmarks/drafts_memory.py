"""What a draft holds of memory beside its target: weights, and the share of the KV pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from benchmarks.drafts_engine import Served

if TYPE_CHECKING:
    from engine.runtime.worker import LocalWorker

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that one engine holds. The pools hold the same number of tokens, as they share their blocks."""

    variant: str
    target_weights: int
    draft_weights: int
    target_pool: int
    draft_pool: int

    @property
    def share(self) -> float:
        """The draft's memory over the target's, weights and pool together."""
        return (self.draft_weights + self.draft_pool) / (self.target_weights + self.target_pool)

    def cells(self) -> list[str]:
        """A row of a table."""
        sizes = (self.target_weights, self.draft_weights, self.target_pool, self.draft_pool)
        return [self.variant, *(f"{size / MIB:.1f}" for size in sizes), f"{100 * self.share:.1f} %"]


HEAD = ["memory, MiB", "target's weights", "draft's weights", "target's pool", "draft's pool", "draft over target"]


def memory(served: Served) -> Memory:
    """As the loaded worker counts it."""
    held = cast("LocalWorker", served.worker).memory
    return Memory(served.variant.name, held.target_weights, held.draft_weights, held.target_pool, held.draft_pool)
