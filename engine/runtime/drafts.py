"""Draft networks beside a target: found by name, loaded for it, bound to a pool that shares its block ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from engine.config import DraftConfig, EngineConfig
from engine.errors import ConfigError
from engine.hub.resolve import resolve as find
from engine.models.draft_host import DraftHost, LoadedDraft, embedding_of, head_of
from engine.protocols import Follower
from engine.registry import DRAFT_MODELS, DRAFTERS, resolve
from engine.runtime.loading import LoadedModel, OnPhase, phase
from engine.runtime.weights import pack_linears, weight_bytes


def load_draft(config: DraftConfig | None, loaded: LoadedModel, folder: Path, on_phase: OnPhase) -> LoadedDraft | None:
    """The configured drafter's network, where it has one, for the target loaded from `folder`.

    Raises ConfigError where the path of a network is missing, not wanted, or its drafts are shorter than asked for,
    and ModelLoadError.
    """
    if config is None:
        return None
    resolve(DRAFTERS, config.drafter, "drafter")
    if config.drafter not in DRAFT_MODELS:
        if config.path:
            raise ConfigError(f"models.draft.path: the drafter {config.drafter!r} has no network to load")
        return None
    if not config.path:
        raise ConfigError(f"models.draft.path: the drafter {config.drafter!r} needs the folder of its network")
    load = cast(Callable[[Path, DraftHost], LoadedDraft], resolve(DRAFT_MODELS, config.drafter, "drafter"))
    with phase("draft", on_phase) as note:
        draft = load(_folder(config.path), draft_host(loaded, folder))
        note.append(f"{draft.detail}, {weight_bytes(draft.network) / 2**20:.1f} MiB")
    if config.max_draft is not None and config.max_draft > draft.most:
        raise ConfigError(
            f"models.draft.max_draft: {config.max_draft} is more than the {draft.most} tokens that {config.path} drafts"
        )
    return draft


def draft_host(loaded: LoadedModel, folder: Path | None = None) -> DraftHost:
    """What a draft needs of its target, which came from `folder`. Raises ModelLoadError where it can't be told."""
    model, placement = loaded.adapter.model, loaded.placement
    return DraftHost(
        config=model.config,
        embedding=embedding_of(model),
        head=head_of(model),
        attention=loaded.attention,
        dtype=placement.dtype,
        device=placement.device,
        context_length=loaded.context_length,
        pack=pack_linears if placement.quant == "fp16" else lambda _: None,
        folder=folder,
    )


def scratch_blocks(config: EngineConfig, draft: LoadedDraft | None) -> int:
    """Blocks of the draft's pool that no sequence owns: for drafts that reach past a sequence's own blocks."""
    return 0 if draft is None else config.scheduler.max_num_seqs * -(-draft.reach // config.kv.block_size)


def bind_draft(draft: LoadedDraft, config: EngineConfig, num_blocks: int) -> Follower:
    """The draft over a pool for a target with `num_blocks` blocks."""
    total = num_blocks + scratch_blocks(config, draft)
    return draft.bind(total, config.kv.block_size, range(num_blocks, total))


def _folder(path: str) -> Path:
    """A folder as it is, or a hub id."""
    return find(path, Path("~/.cache/slipstream").expanduser())
