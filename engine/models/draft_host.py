"""How the worker and a draft network meet: what a draft is loaded for, and what it is before it has a KV pool.

A kind of draft is one `load(folder, host) -> LoadedDraft`, named in `registry.DRAFT_MODELS`; its drafter takes what
`bind` returns as its only argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from engine.errors import ModelLoadError
from engine.models.fused.backbone import FusedBackbone
from engine.protocols import AttentionBackend, Follower

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True, eq=False)
class DraftHost:
    """The target of a draft, and where and in which numbers both run."""

    config: PretrainedConfig  # the target's
    embedding: nn.Module  # ids [...] -> [..., width]
    head: nn.Module  # hidden states [T, width] -> logits [T, vocabulary]; its weights may be packed
    attention: AttentionBackend
    dtype: torch.dtype
    device: torch.device
    context_length: int  # tokens of the longest sequence
    pack: Callable[[nn.Module], object]  # packs a module's linear layers in place where the target's are packed
    folder: Path | None = None  # where the target's tokenizer is, if known


class LoadedDraft(Protocol):
    """A checked draft network without a KV pool."""

    @property
    def network(self) -> nn.Module:
        """Its own weights, without those of the target that it uses, too."""
        ...

    @property
    def detail(self) -> str:
        """Format, layers and lengths, in words, for the start-up table."""
        ...

    @property
    def most(self) -> int:
        """Tokens of its longest draft."""
        ...

    @property
    def width(self) -> int:
        """Of its last hidden states."""
        ...

    @property
    def reach(self) -> int:
        """Positions past the last committed token's that a draft writes to its pool."""
        ...

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one block of its pool."""
        ...

    def bind(self, num_blocks: int, block_size: int, scratch: range) -> Follower:
        """The draft over a new pool of `num_blocks` blocks.

        Blocks `scratch`, its last ones, are no sequence's: there is room in them for the reach of as many requests as
        run in one step. The others share the target's ids.
        """
        ...


def embedding_of(model: PreTrainedModel) -> nn.Module:
    """The target's embedding table, ids [...] -> [..., width]. Raises ModelLoadError where it can't be told."""
    base = model.base_model
    if isinstance(base, FusedBackbone):
        return base.get_submodule(base.embedding)
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:
        found = None
    if found is None:
        size = model.config.get_text_config().vocab_size
        tables = [part for part in base.modules() if isinstance(part, nn.Embedding) and part.num_embeddings == size]
        found = tables[0] if len(tables) == 1 else None
    if not isinstance(found, nn.Module):
        raise ModelLoadError(f"{model.config.model_type}: its embedding table can't be told, and a draft needs it")
    return found


def head_of(model: PreTrainedModel) -> nn.Module:
    """The target's output head, [T, width] -> [T, vocabulary]. Raises ModelLoadError where it can't be told."""
    found = model.get_output_embeddings()
    if found is None:
        size = model.config.get_text_config().vocab_size
        heads = [part for part in model.children() if getattr(part, "out_features", None) == size]
        found = heads[0] if len(heads) == 1 else None
    if not isinstance(found, nn.Module):
        raise ModelLoadError(f"{model.config.model_type}: its output head can't be told, and a draft needs it")
    return found
