"""The kinds of drafts that can be trained: how each is made from a target and its answers, and how it is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from engine.errors import ConfigError
from engine.models.dflash.spec import DFlashSpec, DraftLayer
from training import target
from training.batches import Corpus
from training.checkpoint import save_zlab
from training.dflash import DFlashTask, Recipe, initialise
from training.eagle3_draft import Eagle3Draft
from training.network import DraftNetwork
from training.shapes import Shape, vocabulary
from training.trainer import Task


class Draft(Protocol):
    """One draft on its way."""

    @property
    def task(self) -> Task: ...

    def save(self, folder: Path) -> None: ...

    def facts(self) -> dict[str, object]:
        """Lines of the card."""
        ...


class DraftKind(Protocol):
    """Makes drafts of one kind."""

    def __call__(self, folder: Path, corpus: Corpus, shape: Shape, device: torch.device) -> Draft: ...

    def default_taps(self, layers: int) -> tuple[int, ...]:
        """Layers to read of a target with so many."""
        ...


class DFlashDraft:
    """A DFlash draft, saved in z-lab's layout."""

    def __init__(self, folder: Path, corpus: Corpus, shape: Shape, device: torch.device) -> None:
        last = target.last_layer(folder)
        if not all(0 <= tap <= last for tap in shape.taps):
            raise ConfigError(f"--taps {shape.taps}: the target's layers are 0 to {last}")
        parts = target.load(folder, tuple(range(max(0, last + 1 - shape.layers), last + 1)))
        counts = corpus.counts(len(parts.embedding))
        self._vocabulary = vocabulary(counts, shape.draft_vocab)
        self._spec = _spec(parts, shape, corpus.unused(len(parts.embedding)), len(self._vocabulary))
        columns = corpus.columns(shape.taps, self._spec.hidden_size)
        self._network = DraftNetwork(self._spec, corpus.scale(columns)).to(device)
        if not shape.random_start:
            initialise(self._network, parts)
        self._parts, self._corpus, self._shape = parts, corpus, shape
        recipe = Recipe(shape.decay, shape.hard)
        columns = corpus.columns((*shape.taps, last), self._spec.hidden_size)
        self.task: Task = DFlashTask(self._network, parts, self._vocabulary, columns, recipe, device)

    @staticmethod
    def default_taps(layers: int) -> tuple[int, ...]:
        """The paper's rule for five taps, where the target has so many layers."""
        return tuple(sorted({max(0, round(1 + i * (layers - 4) / 4)) for i in range(5)}))

    def save(self, folder: Path) -> None:
        tensors = {name: value.detach().cpu().to(torch.bfloat16) for name, value in self._network.folded().items()}
        if len(self._vocabulary) < self._spec.vocab_size:
            tensors["d2t"] = self._vocabulary
            tensors["lm_head.weight"] = self._parts.head[self._vocabulary].to(torch.bfloat16)
        save_zlab(folder, self._spec, tensors, {"num_target_layers": self._parts.config.num_hidden_layers})

    def facts(self) -> dict[str, object]:
        spec = self._spec
        layout = "DSpark's (the anchor's slot drafts, too)" if spec.anchor_predicts else "DFlash's"
        return {
            "layers": len(spec.layers),
            "layout": f"{layout}, {spec.block_size} slots, {spec.most} drafted tokens",
            "target layers read": ", ".join(map(str, spec.taps)),
            "draft vocabulary": f"{spec.draft_vocab_size:,} of {spec.vocab_size:,} ids",
            "Markov rank": spec.markov_rank or "none",
            "trained parameters": f"{sum(p.numel() for p in self._network.parameters()):,}",
            "answers": f"{len(self._corpus.training):,} with {self._corpus.tokens:,} tokens, by the target itself",
            "loss": f"{self._shape.hard:g} label + {1 - self._shape.hard:g} target's law, gamma {self._shape.decay:g}",
        }


def _spec(parts: target.TargetParts, shape: Shape, unused: int, draft_vocab: int) -> DFlashSpec:
    config = parts.config
    mask = shape.mask_token_id if shape.mask_token_id >= 0 else unused
    if mask >= len(parts.embedding):
        raise ConfigError(f"--mask-token-id {mask}: the target's embedding has {len(parts.embedding)} rows")
    theta = float(config.rope_parameters["rope_theta"])
    return DFlashSpec(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        layers=(DraftLayer(),) * shape.layers,
        taps=shape.taps,
        block_size=shape.block_size,
        mask_token_id=mask,
        vocab_size=len(parts.embedding),
        draft_vocab_size=draft_vocab,
        rms_norm_eps=config.rms_norm_eps,
        rope=(("rope_theta", theta), ("rope_type", "default")),
        max_position_embeddings=config.max_position_embeddings,
        anchor_predicts=shape.anchor_predicts,
        own_head=draft_vocab < len(parts.embedding),
        markov_rank=shape.markov_rank,
    )


DRAFTS: dict[str, DraftKind] = {"dflash": DFlashDraft, "eagle3": Eagle3Draft}
