"""What drafts bring along: their networks, found, loaded and bound to a pool that shares its block ids; verifiers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from torch import nn

from engine.config import CACHE_DIR, DraftConfig, EngineConfig, ModelConfig
from engine.errors import ConfigError
from engine.hub.resolve import resolve as find
from engine.models.draft_host import DraftHost, LoadedDraft, embedding_of, head_of
from engine.models.verifier_head import PairPart, load_head
from engine.protocols import Drafter, Follower, Verifier, VerifierHead
from engine.registry import DRAFT_MODELS, DRAFTERS, resolve
from engine.runtime.assembly import build_verifiers
from engine.runtime.batch import SeqInput
from engine.runtime.loading import LoadedModel
from engine.runtime.packing import pack_linears, weight_bytes
from engine.runtime.phases import OnPhase, phase
from engine.runtime.runner import ModelRunner


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
        draft = load(find_folder(config.path), draft_host(loaded, folder))
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
        pack=_packing(loaded),
        folder=folder,
    )


def _packing(loaded: LoadedModel) -> Callable[[nn.Module], object]:
    """Packs a draft network in place as its target is packed."""
    quant = loaded.placement.quant
    return (lambda _: None) if quant == "none" else (lambda network: pack_linears(network, quant, head=None))


def scratch_blocks(config: EngineConfig, draft: LoadedDraft | None) -> int:
    """Blocks of the draft's pool that no sequence owns: for drafts that reach past a sequence's own blocks."""
    return 0 if draft is None else config.scheduler.max_num_seqs * -(-draft.reach // config.kv.block_size)


def bind_draft(draft: LoadedDraft, config: EngineConfig, num_blocks: int, scratch: int | None = None) -> Follower:
    """The draft over a pool for a target with `num_blocks` blocks, with room for all requests, or `scratch` blocks."""
    total = num_blocks + (scratch_blocks(config, draft) if scratch is None else scratch)
    return draft.bind(total, config.kv.block_size, range(num_blocks, total))


def offer_verifiers(
    config: ModelConfig,
    folder: Path,
    runner: ModelRunner,
    draft: LoadedDraft | None,
    drafter: Drafter | None,
    on_phase: OnPhase,
) -> list[Verifier]:
    """All verifiers that requests to the target of `folder` may choose from, the configured one first; none undrafted.

    Must come before the first request. Raises ConfigError and ModelLoadError.
    """
    if drafter is None:
        return []
    head = _verifier_head(config, folder, runner, draft, on_phase) if config.verifier.head else None
    return build_verifiers(config, drafter, head)


def _verifier_head(
    config: ModelConfig, folder: Path, runner: ModelRunner, draft: LoadedDraft | None, on_phase: OnPhase
) -> VerifierHead:
    """The configured trained head, for this very pair of networks."""
    if draft is None or config.draft is None:
        raise ConfigError("models.verifier.head: a head reads hidden states of a draft network, and here is none")
    with phase("verifier head", on_phase) as note:
        _, states = runner.forward_with_states([SeqInput([0], 0, (0,), 1)], [0])  # can they be had, and how wide?
        pair = PairPart(folder, states.shape[-1]), PairPart(find_folder(config.draft.path), draft.width)
        head = load_head(find_folder(config.verifier.head), *pair, runner.adapter.device)
        note.append(config.verifier.head)
    return head


def find_folder(path: str) -> Path:
    """The folder of a second checkpoint: a folder as it is, or a hub id. Raises ModelLoadError."""
    return find(path, Path(CACHE_DIR).expanduser())
