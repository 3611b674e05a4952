"""A fast diffusion model beside the served one, over the same block ids and the same tokens: `dual_diffusion`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from engine.config import EngineConfig, VerifierConfig
from engine.errors import ModelLoadError
from engine.hub.diffusion import find_spec, settle_pipeline
from engine.runtime.drafts import find_folder
from engine.runtime.loading import LoadedModel, load_checked
from engine.runtime.phases import OnPhase, phase
from engine.types import Phase


def settle_model(config: EngineConfig, folder: Path) -> EngineConfig:
    """The configuration with a pipeline that fits the checkpoint of `folder`. Raises ModelLoadError if none does."""
    return replace(config, model=settle_pipeline(config.model, find_spec(folder, config.model.diffusion)))


def load_fast(engine: EngineConfig, served: LoadedModel, folder: Path, on_phase: OnPhase) -> LoadedModel | None:
    """The model of `diffusion.drafter`, where there is one, for `served`, which came from `folder`.

    Raises ModelLoadError where it is no diffusion model or counts other tokens: their ids go back and forth between
    the two, and a text that is written anew in other tokens need not be the same text.
    """
    config = engine.model
    if config.diffusion is None or not config.diffusion.drafter:
        return None
    name = f"diffusion.drafter: {config.diffusion.drafter_name}"
    with phase("drafter's checkpoint", on_phase):
        place = find_folder(config.diffusion.drafter)
        spec = find_spec(place)
        if spec is None:
            raise ModelLoadError(f"{name} is no masked-diffusion model")
        if problem := _token_difference(folder, place):
            raise ModelLoadError(
                f"{name} has another tokenizer than {config.name} ({problem}); both must have the same, as a text that "
                "is put into other tokens half-way is not exactly the same text"
            )
    alone = replace(
        config, path=config.diffusion.drafter, pipeline="masked_diffusion", diffusion=None, verifier=VerifierConfig()
    )

    def told(done: Phase) -> None:
        on_phase(Phase(f"drafter: {done.name}", *_rest(done)))

    fast = load_checked(alone, place, told, engine.kv.dtype, engine.cache_folder)
    if served.diffusion is None or fast.diffusion is None or served.diffusion.mask_id != spec.mask_id:
        raise ModelLoadError(f"{name} has another mask token than {config.name}")
    return fast


def _rest(done: Phase) -> tuple[float, int, str]:
    return done.seconds, done.memory, done.detail


def _token_difference(first: Path, second: Path) -> str:
    """One difference between the vocabularies of two folders, in words; empty if there is none."""
    ours, theirs = _vocabulary(first), _vocabulary(second)
    for token in ours:
        if ours[token] != theirs.get(token):
            return f"{token[:40]!r} is {ours[token]} here and {theirs.get(token, 'unknown')} there"
    return next((f"{token[:40]!r} is unknown here" for token in theirs if token not in ours), "")


def _vocabulary(folder: Path) -> dict[str, int]:
    """Ids by token, added tokens among them. Raises ModelLoadError for a folder without a readable tokenizer.json."""
    try:
        values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        listed = values["model"]["vocab"]
        found = dict(listed) if isinstance(listed, dict) else {entry[0]: i for i, entry in enumerate(listed)}
        found |= {entry["content"]: entry["id"] for entry in values.get("added_tokens") or ()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelLoadError(f"{folder.name}: its tokenizer.json can't be read: {str(error)[:200]}") from error
    return found
