"""From shards to training batches: some sequences, with random anchors in their answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.errors import ConfigError
from training.data import shards
from training.data.states import TargetStates

SHORTEST = 8  # answers of fewer tokens teach little


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """B sequences with up to A anchors each.

    `tokens` [B, S] int64, `lengths` [B], `states` [B, S, stored taps * width] float16, `anchors` [B, A] positions,
    `visible` [B, A] bool.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    states: torch.Tensor
    anchors: torch.Tensor
    visible: torch.Tensor


class Corpus:
    """All samples of a folder's shards; every `hold_out`-th sample is kept for evaluation.

    Hidden states are mapped from disk or, where the shards hold none, computed by `source` for every batch.
    """

    def __init__(
        self,
        folder: Path,
        target: Path | None = None,
        taps: tuple[int, ...] = (),
        device: torch.device | None = None,
        hold_out: int = 50,
    ) -> None:
        """`target`: the model to compute hidden states with, after the layers `taps`. Raises ConfigError."""
        self._device = device or torch.device("cpu")
        self.paths = shards.paths(folder)
        self._shards = [shards.read(path) for path in self.paths]
        self._source = TargetStates(target, taps, self._device) if target is not None else None
        self.taps = taps if self._source else shards.taps_of(self.paths[0])
        if not set(taps) <= set(self.taps):
            raise ConfigError(f"{folder} holds the layers {self.taps} of the target, not all of {taps}")
        index = [(s, i) for s, shard in enumerate(self._shards) for i in range(len(shard))]
        index = [entry for entry in index if self._answer(*entry) >= SHORTEST]
        self.held_out = index[::hold_out]
        self.training = [entry for number, entry in enumerate(index) if number % hold_out]
        if not self.training:
            raise ConfigError(f"{folder}: {len(index)} answers of {SHORTEST} tokens or more are too few")
        self.tokens = sum(self._answer(*entry) for entry in self.training)

    def _answer(self, shard: int, i: int) -> int:
        data = self._shards[shard]
        return int(data.starts[i + 1] - data.starts[i] - data.prompt_lens[i])

    def columns(self, taps: Sequence[int], width: int) -> torch.Tensor:
        """Where the outputs of these layers stand among the stored states."""
        return torch.cat([torch.arange(width) + self.taps.index(tap) * width for tap in taps])

    def counts(self, vocab_size: int) -> torch.Tensor:
        """How often each id stands in the training answers, [vocabulary] int64."""
        found = torch.zeros(vocab_size, dtype=torch.int64)
        for s, i in self.training:
            data = self._shards[s]
            start, end = int(data.starts[i]) + int(data.prompt_lens[i]), int(data.starts[i + 1])
            found += torch.bincount(data.tokens[start:end].long(), minlength=vocab_size)
        return found

    def unused(self, vocab_size: int) -> int:
        """The lowest id that no text has, prompts included; special tokens come first in most vocabularies."""
        used = torch.zeros(vocab_size, dtype=torch.bool)
        for data in self._shards:
            used[data.tokens.long()] = True
        return int(used.long().argmin())

    def scale(self, columns: torch.Tensor, samples: int = 64) -> torch.Tensor:
        """Root mean square of each of these columns, over some samples."""
        states = torch.cat([self._sample(*entry)[1][:-1, columns].float() for entry in self.training[:samples]])
        return states.pow(2).mean(0).sqrt().clamp(min=1e-3)

    def _sample(self, shard: int, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [T] int64 and states [T, taps * width] of one sample."""
        data = self._shards[shard]
        start, end = int(data.starts[i]), int(data.starts[i + 1])
        tokens = data.tokens[start:end].long()
        if self._source is None:
            return tokens, data.states[start:end]
        return tokens, self._source(tokens)

    def batch(
        self, entries: Sequence[tuple[int, int]], anchors: int, columns: torch.Tensor, generator: torch.Generator
    ) -> Batch:
        """Random anchors p where p and p + 1 belong to the answer."""
        samples = [self._sample(*entry) for entry in entries]
        lengths = [len(tokens) for tokens, _ in samples]
        prompts = [int(self._shards[s].prompt_lens[i]) for s, i in entries]
        longest = max(lengths)
        tokens = torch.zeros(len(entries), longest, dtype=torch.int64)
        states = torch.zeros(len(entries), longest, len(columns), dtype=torch.float16)
        at = torch.zeros(len(entries), anchors, dtype=torch.int64)
        visible = torch.zeros(len(entries), anchors, dtype=torch.bool)
        for row, (ids, kept) in enumerate(samples):
            tokens[row, : len(ids)] = ids
            states[row, : len(ids)] = kept[:, columns]
            choices = torch.arange(prompts[row], lengths[row] - 1)
            picked = choices[torch.randperm(len(choices), generator=generator)[:anchors]].sort().values
            at[row, : len(picked)] = picked
            visible[row, : len(picked)] = True
        return Batch(*(part.to(self._device) for part in (tokens, torch.tensor(lengths), states, at, visible)))

    def epochs(self, sequences: int, anchors: int, columns: torch.Tensor, seed: int, skip: int = 0) -> Iterator[Batch]:
        """Batches without end, in a new order each epoch; batch number n is always the same. `skip` leaves out some."""
        number = 0
        for epoch in range(1 << 30):
            order = torch.randperm(len(self.training), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
            for start in range(0, len(order), sequences):
                number += 1
                if number <= skip:
                    continue
                generator = torch.Generator().manual_seed(seed * 7919 + number)
                entries = [self.training[i] for i in order[start : start + sequences]]
                yield self.batch(entries, anchors, columns, generator)
