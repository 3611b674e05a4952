"""ModelRunner: one model and its KV pool; packs sequences, runs a forward pass, gives logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.errors import ModelLoadError
from engine.models.adapter import DecoderAdapter
from engine.models.context import PagedContext, Taps
from engine.models.draft_host import head_of
from engine.models.taps import head_inputs
from engine.protocols import AttentionBackend, Follower
from engine.runtime.batch import AttentionMode, DeviceBatch, Packer, SeqInput
from engine.runtime.kv_cache import PagedKVCache
from engine.runtime.transfer import to_device


class ModelRunner:
    """Runs one model over its pool. Holds no state of any request."""

    def __init__(self, adapter: DecoderAdapter, cache: PagedKVCache, attention: AttentionBackend) -> None:
        self.adapter = adapter
        self.cache = cache
        self.attention = attention
        self._follower: Follower | None = None
        self._packer = Packer(cache.block_size, adapter.device)

    def follow(self, follower: Follower) -> None:
        """From now on `follower` hears of every pass and every move of slots."""
        self._follower = follower

    @property
    def vocab_size(self) -> int:
        return self.adapter.vocab_size

    @property
    def block_size(self) -> int:
        return self.cache.block_size

    def forward(
        self,
        inputs: Sequence[SeqInput],
        rows: Sequence[int],
        mode: AttentionMode = AttentionMode.CAUSAL,
        block_length: int = 1,
    ) -> torch.Tensor:
        """Feed all inputs in one pass; fp32 logits [len(rows), vocabulary] of the given rows of the packed tokens."""
        batch = self._packer.pack(inputs, mode, block_length)
        (wanted,) = to_device([torch.tensor(rows, dtype=torch.long)], self.adapter.device)
        return self.forward_batch(batch, wanted)

    def forward_batch(self, batch: DeviceBatch, wanted: torch.Tensor) -> torch.Tensor:
        """`forward` of a batch and rows [m] that are on the device."""
        context = PagedContext(self.cache, self.attention.prepare(batch), batch.slots)
        if self._follower is None:
            return self.adapter.forward(batch.ids, batch.positions, wanted, context)
        taps = Taps(self._follower.taps)
        logits = self.adapter.forward(batch.ids, batch.positions, wanted, context, taps)
        self._follower.write(tuple(taps.states[layer] for layer in self._follower.taps), batch)
        return logits

    def forward_with_states(
        self,
        inputs: Sequence[SeqInput],
        rows: Sequence[int],
        mode: AttentionMode = AttentionMode.CAUSAL,
        block_length: int = 1,
        *,
        read: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward`, and what the output head made the logits of: [len(rows), width] in the model's dtype.

        That is after the final norm. With `read` these are of other rows, [len(read), width], which cost no logits.
        Raises ModelLoadError where the head can't be told or is not called.
        """
        read = rows if read is None else read
        known = {row: place for place, row in enumerate(rows)}
        others = [row for row in dict.fromkeys(read) if row not in known]
        known.update((row, len(rows) + place) for place, row in enumerate(others))
        with head_inputs(head_of(self.adapter.model), max(1, len(rows))) as found:
            logits = self.forward(inputs, [*rows, *others], mode, block_length)
        states = found[0].flatten(0, -2) if len(found) == 1 else None
        if states is None or len(states) != len(rows) + len(others):
            kind = self.adapter.model.config.model_type
            raise ModelLoadError(f"{kind}: what its output head reads can't be told, and it is needed here")
        if read is not rows:
            (places,) = to_device([torch.tensor([known[row] for row in read])], self.adapter.device)
            states = states[places]
        return logits[: len(rows)], states

    def compact(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy slots `source` [k] to slots `target` [k], in the model's pool and in its follower's."""
        self.cache.compact(source, target)
        if self._follower is not None:
            self._follower.compact(source, target)
