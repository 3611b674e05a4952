"""An EAGLE-3 draft over a pool of its own, under the target's block ids.

The pair of token p and feature g of position p - 1 is kept under the slot of position p, so that an entry depends on
the tokens up to its own position alone, and whoever shares a prefix shares its entries. Position 0 has no pair:
attention sees a table of single slots that begins with position 1, whose places are the published draft's positions.
Features are kept too: the first token of any later pass needs that of the position before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from engine.models.draft_files import TargetFacts
from engine.models.draft_host import DraftHost
from engine.models.eagle3 import formats
from engine.models.eagle3.network import Eagle3Network
from engine.models.eagle3.parents import parent_places
from engine.models.eagle3.spec import Eagle3Spec
from engine.protocols import DraftAsk
from engine.runtime.batch import DeviceBatch
from engine.runtime.kv_cache import LayerShape, PagedKVCache, block_bytes


class Eagle3Model:
    """See `protocols.ChainDraftModel` and `protocols.Follower`."""

    def __init__(self, draft: LoadedEagle3, cache: PagedKVCache) -> None:
        self.network = draft.network
        self.cache = cache
        self.most = draft.most
        self.taps = draft.network.spec.taps
        self.device = draft.host.device
        self._host = draft.host
        self._ids = draft.ids
        self._head: nn.Module = draft.host.head if self.network.head is None else self.network.head

    @torch.inference_mode()
    def write(self, states: tuple[torch.Tensor, ...], batch: DeviceBatch) -> None:
        size = batch.block_size
        features = self.cache.layers[1].joint
        features.index_copy_(0, batch.slots, self.network.fuse(states))
        rows = torch.repeat_interleave(
            torch.arange(batch.num_seqs, device=self.device), batch.query_starts.diff(), output_size=len(batch.ids)
        )
        before = parent_places(batch, rows)
        slots = batch.block_tables[rows, before // size].long() * size + before % size
        both, _ = self.network.inputs(self.embed(batch.ids), features.index_select(0, slots))
        rope = self.network.rope((batch.positions - 1).clamp_(min=0).unsqueeze(0))
        self.network.write(both, rope, batch.slots, self.cache.layers[0])

    def compact(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.cache.compact(source, target)

    def start(self, asks: Sequence[DraftAsk]) -> Eagle3Chain:
        return Eagle3Chain(self, self._host, asks)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [T] -> [T, width]."""
        own = self.network.embedding
        embedded: torch.Tensor = self._host.embedding(ids) if own is None else F.embedding(ids, own)
        return embedded

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """[T, width] -> [T, draft vocabulary] float32."""
        return self._head(normed)[:, : self.network.spec.draft_vocab_size].float()

    def target_ids(self, ids: torch.Tensor) -> torch.Tensor:
        return ids if self._ids is None else self._ids[ids]

    def widen(self, logits: torch.Tensor) -> torch.Tensor:
        if self._ids is None:
            return logits
        wide = logits.new_full((*logits.shape[:-1], self.network.spec.vocab_size), float("-inf"))
        wide[..., self._ids] = logits
        return wide


class Eagle3Chain:
    """See `protocols.DraftChain`. Its entries are temporary: the target's next pass writes the true ones over them."""

    def __init__(self, model: Eagle3Model, host: DraftHost, asks: Sequence[DraftAsk]) -> None:
        self._model = model
        self._attention = host.attention
        device, size = host.device, model.cache.block_size
        # Places of the table are positions less one, and pass j feeds the token at position + j.
        self._last = [ask.position - 1 for ask in asks]
        blocks = [ask.block_ids[: (ask.position + ask.limit - 1) // size + 1] for ask in asks]
        width = max(map(len, blocks))
        table = torch.tensor([[*row, *([0] * (width - len(row)))] for row in blocks], device=device)
        slots = (table.unsqueeze(-1) * size + torch.arange(size, device=device)).flatten(1)
        self._places = torch.tensor(self._last, device=device)
        before = slots.gather(1, self._places.unsqueeze(1)).squeeze(1)
        self._slots = slots[:, 1:]
        self._table = self._slots.to(torch.int32).contiguous()
        self._hidden = model.cache.layers[1].joint.index_select(0, before)
        self._starts = torch.arange(len(asks) + 1, dtype=torch.int32, device=device)

    @torch.inference_mode()
    def advance(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        model, count = self._model, len(tokens)
        places = self._places[:count]
        slots = self._slots[:count].gather(1, places.unsqueeze(1)).squeeze(1)
        batch = DeviceBatch(
            ids=tokens,
            positions=places,
            slots=slots,
            query_starts=self._starts[: count + 1],
            kv_lens=(places + 1).to(torch.int32),
            block_tables=self._table[:count],
            block_size=1,
            query_lens=(1,) * count,
            kv_lens_host=tuple(place + 1 for place in self._last[:count]),
            aligned=True,
        )
        network = model.network
        both, residual = network.inputs(model.embed(tokens), self._hidden[:count])
        rope = network.rope(places.unsqueeze(0))
        step = self._attention.prepare(batch)
        self._hidden, normed = network(both, residual, rope, slots, model.cache.layers[0], step)
        self._places, self._last = places + 1, [place + 1 for place in self._last[:count]]
        return model.logits(normed), normed


@dataclass(frozen=True, slots=True, eq=False)
class LoadedEagle3:
    """See `draft_host.LoadedDraft`."""

    network: Eagle3Network
    host: DraftHost
    detail: str
    ids: torch.Tensor | None = None  # [draft vocabulary] int64: each token's id in the target's vocabulary

    @property
    def most(self) -> int:
        return self.network.spec.most

    @property
    def width(self) -> int:
        return self.network.spec.hidden_size

    @property
    def reach(self) -> int:
        return 0  # it never writes past the slots that its requests own: nothing is drafted past their limits

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """What one slot of the pool holds: keys and values, and the feature."""
        return self.network.shape, LayerShape(1, self.network.spec.hidden_size, 0)

    def block_bytes(self, block_size: int) -> int:
        return block_bytes(self.shapes, block_size, self.host.dtype)

    def bind(self, num_blocks: int, block_size: int, scratch: range) -> Eagle3Model:  # noqa: ARG002  none is needed
        return Eagle3Model(self, PagedKVCache(self.shapes, num_blocks, block_size, self.host.dtype, self.host.device))


def load(folder: Path, host: DraftHost) -> LoadedEagle3:
    """The draft of a folder for this target. Raises ModelLoadError."""
    return assemble(*formats.load(folder, TargetFacts.of(host.config)), host)


@torch.no_grad()
def assemble(spec: Eagle3Spec, stored: dict[str, torch.Tensor], kind: str, host: DraftHost) -> LoadedEagle3:
    """The draft from tensors as `formats.load` gives them; `kind` names their format."""
    tensors = {
        name: tensor.to(host.device, host.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in stored.items()
    }
    table = host.embedding.weight
    if spec.own_embedding and isinstance(table, torch.Tensor) and torch.equal(tensors["embed_tokens.weight"], table):
        spec = replace(spec, own_embedding=False)  # a copy of the target's
    network = Eagle3Network(spec, tensors, host.context_length)
    size = sum(parameter.nbytes for parameter in network.parameters())
    host.pack(network)
    taps = ", ".join(map(str, spec.taps))
    detail = f"{kind}: taps {taps}, vocabulary of {spec.draft_vocab_size}, {size / 1e6:.0f} MB"
    return LoadedEagle3(network.eval(), host, detail, tensors.get("d2t"))
