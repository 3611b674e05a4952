"""A block-diffusion draft over a KV pool of its own that shares the target's block ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from engine.errors import ModelLoadError
from engine.kernels.layout import PagedBatch
from engine.kernels.matrix import PackedMatrix
from engine.kernels.matrix import pack as pack_matrix
from engine.models.dflash.formats import load as read
from engine.models.dflash.network import DFlashNetwork
from engine.models.dflash.program import DraftProgram, draft_program, paged_of
from engine.models.dflash.spec import DFlashSpec
from engine.models.dflash.weights import drop_copies
from engine.models.draft_files import TargetFacts
from engine.models.draft_host import DraftHost
from engine.protocols import DraftAsk
from engine.runtime.batch import AttentionMode, DeviceBatch, SeqInput, pack
from engine.runtime.kv_cache import PagedKVCache, block_bytes


class DFlashModel:
    """See `protocols.BlockDraftModel` and `protocols.Follower`."""

    def __init__(self, draft: LoadedDFlash, cache: PagedKVCache, scratch: range) -> None:
        self.network = draft.network
        self.spec = draft.network.spec
        self.cache = cache
        self.most = self.spec.most
        self.sequential = self.network.refiner is not None
        self.taps = tuple(tap for tap in self.spec.taps if tap >= 0)
        self._host = draft.host
        self._scratch = scratch
        self._each = -(-draft.reach // cache.block_size)
        self._ids = draft.ids
        self._mask = self._embed(torch.tensor([self.spec.mask_token_id], device=draft.host.device))
        if draft.mask_embedding is not None:
            self._mask = draft.mask_embedding[None] * self.spec.embedding_scale
        self._head: nn.Module = draft.host.head if self.network.head is None else self.network.head
        self._causal = {layer.causal for layer in self.spec.layers}
        # Where the mask has an embedding of its own, or the network its own table, ids alone would not do.
        own = draft.mask_embedding is not None or self.network.embedding is not None
        table = None if own else draft.host.embedding
        self.program = draft_program(self.network, self._head, table, cache.layers)

    @torch.inference_mode()
    def write(self, states: tuple[torch.Tensor, ...], batch: DeviceBatch) -> None:
        if len(states) < len(self.spec.taps):  # tap -1 is the target's embedding
            rest = iter(states)
            states = tuple(next(rest) if tap >= 0 else self._host.embedding(batch.ids) for tap in self.spec.taps)
        self.network.write_context(states, batch.positions, batch.slots, self.cache)

    def compact(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.cache.compact(source, target)

    @torch.inference_mode()
    def blocks(self, anchors: Sequence[int], asks: Sequence[DraftAsk]) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = [
            self._input(place, anchor, ask) for place, (anchor, ask) in enumerate(zip(anchors, asks, strict=True))
        ]
        batch = pack(inputs, self.cache.block_size, self._host.device, AttentionMode.BIDIRECTIONAL)
        return self.blocks_of(batch, min(max(ask.limit for ask in asks), self.most))

    def blocks_of(self, batch: DeviceBatch, scored: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`blocks` of a batch of whole blocks, whose first ids are the anchors; the first `scored` tokens of each."""
        spec = self.spec
        size, count, width = spec.block_size, batch.num_seqs, spec.hidden_size
        prepare = self._host.attention.prepare
        if self.program is not None and (paged := paged_of(prepare(batch))) is not None:
            return self._called(self.program, batch, paged, scored)
        embedded = self._embedded(batch)
        attention = {
            causal: prepare(replace(batch, mode=AttentionMode.CAUSAL) if causal else batch) for causal in self._causal
        }
        outcome = self.network(embedded, batch.positions, batch.slots, self.cache, attention)
        # Every slot took part in the pass, but only those that somebody asked for are scored.
        first = int(not spec.anchor_predicts)
        rows = [part.view(count, size, width)[:, first : first + scored].reshape(-1, width) for part in outcome]
        hidden = self.network.final(*rows)
        return self._logits(hidden).view(count, scored, -1), hidden.view(count, scored, width)

    def _embedded(self, batch: DeviceBatch) -> torch.Tensor:
        """Anchors and masks, [T, D]."""
        size, count, width = self.spec.block_size, batch.num_seqs, self.spec.hidden_size
        embedded = self._mask.repeat(size * count, 1).view(count, size, width)
        embedded[:, 0] = self._embed(batch.ids.view(count, size)[:, 0])
        return embedded.view(-1, width)

    def _called(
        self, program: DraftProgram, batch: DeviceBatch, paged: PagedBatch, scored: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`blocks_of` by the program."""
        spec, count = self.spec, batch.num_seqs
        first = int(not spec.anchor_predicts)
        rows = torch.arange(count * spec.block_size).view(count, -1)[:, first : first + scored]
        rows = rows.reshape(-1).contiguous()  # of one column, reshape makes a view with gaps
        logits, hidden = program.run(batch, paged, rows, None if program.embeds else self._embedded(batch))
        logits = logits.view(count, scored, -1)[..., : spec.draft_vocab_size]
        return logits, hidden.view(count, scored, -1)

    @property
    def block_length(self) -> int:
        """Tokens that a pass feeds for each sequence."""
        return self.spec.block_size

    @property
    def scratch(self) -> tuple[int, int]:
        """Its blocks that no sequence owns: the first, and how many a sequence needs of them."""
        return self._scratch.start, self._each

    def refine(self, logits: torch.Tensor, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        if self.network.refiner is None:
            return logits
        with torch.inference_mode():
            refined: torch.Tensor = self.network.refiner(logits, hidden, previous)
        return refined

    def confidence(self, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor | None:
        if self.network.confidence is None:
            return None
        with torch.inference_mode():
            logits: torch.Tensor = self.network.confidence(hidden, previous)
        return logits

    def target_ids(self, ids: torch.Tensor) -> torch.Tensor:
        return ids if self._ids is None else self._ids[ids]

    def widen(self, logits: torch.Tensor) -> torch.Tensor:
        if self._ids is None:
            return logits
        wide = logits.new_full((*logits.shape[:-1], self.spec.vocab_size), float("-inf"))
        wide[..., self._ids] = logits
        return wide

    def _input(self, place: int, anchor: int, ask: DraftAsk) -> SeqInput:
        """A request's block: its own KV blocks as far as they reach, then scratch, which nobody else has."""
        end = ask.position + self.spec.block_size
        needed = -(-end // self.cache.block_size)
        spare = self._scratch[place * self._each : (place + 1) * self._each]
        table = (*ask.block_ids, *spare)[:needed]
        assert len(table) == needed, "a draft reaches past its blocks"
        return SeqInput([anchor, *([self.spec.mask_token_id] * (self.spec.block_size - 1))], ask.position, table, end)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        own = self.network.embedding
        embedded: torch.Tensor = self._host.embedding(ids) if own is None else own[ids]
        return embedded if self.spec.embedding_scale == 1.0 else embedded * self.spec.embedding_scale

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, D] -> [T, draft vocabulary] float32."""
        spec = self.spec
        logits: torch.Tensor = self._head(hidden)[:, : spec.draft_vocab_size].float()
        if spec.logit_scale != 1.0:
            logits = logits * spec.logit_scale
        return logits if spec.logit_softcap is None else torch.tanh(logits / spec.logit_softcap) * spec.logit_softcap


@dataclass(frozen=True, slots=True, eq=False)
class LoadedDFlash:
    """See `draft_host.LoadedDraft`."""

    network: DFlashNetwork
    host: DraftHost
    detail: str
    ids: torch.Tensor | None = None  # [draft vocabulary] int64: each token's id in the target's vocabulary
    mask_embedding: torch.Tensor | None = None  # [width]

    @property
    def most(self) -> int:
        return self.network.spec.most

    @property
    def width(self) -> int:
        return self.network.spec.hidden_size

    @property
    def reach(self) -> int:
        return self.network.spec.block_size - 1

    def block_bytes(self, block_size: int) -> int:
        return block_bytes(self.network.shapes, block_size, self.host.dtype)

    def bind(self, num_blocks: int, block_size: int, scratch: range) -> DFlashModel:
        cache = PagedKVCache(self.network.shapes, num_blocks, block_size, self.host.dtype, self.host.device)
        return DFlashModel(self, cache, scratch)


def load(folder: Path, host: DraftHost) -> LoadedDFlash:
    """The draft of a folder for this target. Raises ModelLoadError."""
    spec, stored, kind = read(folder, TargetFacts.of(host.config, host.folder))
    return assemble(spec, stored, host, kind)


@torch.no_grad()
def assemble(spec: DFlashSpec, stored: dict[str, torch.Tensor], host: DraftHost, kind: str = "DFlash") -> LoadedDFlash:
    """The draft from canonical tensors of any dtype, on any device; `kind` names their format."""
    spec, stored = _without_copies(spec, stored, host)
    _check_ends(spec, host)
    tensors = {
        name: tensor.to(host.device, host.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in stored.items()
    }
    ids, mask = tensors.get("d2t"), tensors.get("mask_embedding")
    if ids is not None and "lm_head.weight" not in tensors:  # its head is those rows of the target's
        tensors |= _rows(host.head, ids)
    network = DFlashNetwork(spec, tensors, host.context_length + spec.block_size)
    size = sum(parameter.nbytes for parameter in network.parameters())
    host.pack(network)
    layers = f"{len(spec.layers)} layer{'s' if len(spec.layers) > 1 else ''}"
    detail = (
        f"{kind}: {layers}, taps {', '.join(map(str, spec.taps))}, blocks of {spec.block_size}, {size / 1e6:.0f} MB"
    )
    return LoadedDFlash(network.eval(), host, detail, ids, mask)


def _without_copies(
    spec: DFlashSpec, stored: dict[str, torch.Tensor], host: DraftHost
) -> tuple[DFlashSpec, dict[str, torch.Tensor]]:
    """See `weights.drop_copies`. What equals the target's once it is rounded like that is as good as a copy."""
    compared = dict(stored)
    for name, module in (("embed_tokens.weight", host.embedding), ("lm_head.weight", host.head)):
        if name in stored:
            compared[name] = _rounded_like(module, stored[name])
    spec, kept = drop_copies(spec, compared, _weight(host.embedding), _weight(host.head))
    return spec, {name: stored[name] for name in kept}


def _rounded_like(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """`weight` as `module`, which may be packed, would hold it; itself where it can't."""
    matrix = getattr(module, "matrix", None)
    if not isinstance(matrix, PackedMatrix):
        return weight if isinstance(module, nn.Linear | nn.Embedding) else weight.half()
    try:
        return pack_matrix(weight, matrix.format).unpack()
    except ValueError:  # larger than the format can hold
        return weight


def _check_ends(spec: DFlashSpec, host: DraftHost) -> None:
    """Raise ModelLoadError where the target's embedding or head, which the draft would use, is of another width."""
    ends = {"embedding table": (host.embedding, spec.own_embedding), "output head": (host.head, spec.own_head)}
    for name, (module, own) in ends.items():
        width = _weight(module).shape[1]
        if not own and width != spec.hidden_size:
            raise ModelLoadError(
                f"the draft's hidden_size is {spec.hidden_size}, but the target's {name}, which it has to use, is "
                f"{width} wide"
            )


def _rows(head: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A head of rows `ids` of the target's, by its tensors' names."""
    bias = getattr(head, "bias", None)
    return {"lm_head.weight": _weight(head)[ids]} | ({} if bias is None else {"lm_head.bias": bias[ids]})


def _weight(module: nn.Module) -> torch.Tensor:
    """[out, in], unpacked where it is packed."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight
