"""Which drafter a draft checkpoint is for. Standard library only: the front process asks before torch is anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from engine.config import UNTRAINED_DRAFTERS, DraftConfig, EngineConfig
from engine.errors import ConfigError, ModelLoadError
from engine.hub.resolve import resolve

# What `architectures`, `speculators_model_type` or `dflash_config.projector_type` holds, in lower case -> drafter.
_MARKS = {"dflash": "dflash", "dspark": "dflash", "eagle3": "eagle3"}
_KNOWN = "DFlash, DFlash2, DSpark and EAGLE-3, in their authors' form or that of the speculators library"


def settle_draft(config: EngineConfig, cache_dir: Path, on_phase: Callable[[str], None] | None = None) -> EngineConfig:
    """The configuration with the drafter's name in place of `auto`; a draft with a hub id is fetched for that.

    Raises ConfigError for a drafter that its checkpoint is not for, ModelLoadError for one that is no draft's.
    """
    draft = config.model.draft
    if draft is None or not draft.path:
        return config
    folder = _resolve(draft, cache_dir, on_phase)
    if draft.drafter == "auto":
        return replace(config, model=replace(config.model, draft=replace(draft, drafter=drafter_of(folder))))
    fitting = _guess(folder)
    if fitting is not None and fitting != draft.drafter:
        raise ConfigError(f"models.draft.drafter: {draft.drafter!r} can't use {draft.name}, which is for {fitting!r}")
    return config


def drafter_of(folder: Path) -> str:
    """The name in registry.DRAFTERS of the drafter that can use this checkpoint. Raises ModelLoadError if none can."""
    found = _guess(folder)
    if found is None:
        names = ", ".join(_architectures(_read(folder))) or "no architecture"
        raise ModelLoadError(
            f"models.draft.path: {folder.name} is no draft that can be used: its config.json names {names}; "
            f"drafts of these kinds can: {_KNOWN}"
        )
    return found


def _resolve(draft: DraftConfig, cache_dir: Path, on_phase: Callable[[str], None] | None) -> Path:
    try:
        return resolve(draft.path, cache_dir, on_phase)
    except ModelLoadError as error:
        plain = ", ".join(UNTRAINED_DRAFTERS)
        raise ModelLoadError(f"models.draft.path: {error} (the drafters without a checkpoint are: {plain})") from error


def _guess(folder: Path) -> str | None:
    config = _read(folder)
    section = config.get("dflash_config")
    projector = section.get("projector_type") if isinstance(section, dict) else None
    said = (config.get("speculators_model_type"), *_architectures(config), projector)
    for text in said:
        for mark, drafter in _MARKS.items():
            if mark in str(text or "").lower().replace("-", "").replace("_", ""):
                return drafter
    return "dflash" if isinstance(section, dict) else None


def _architectures(config: dict[str, object]) -> list[str]:
    names = config.get("architectures")
    return [str(name)[:80] for name in names[:4]] if isinstance(names, list) else []


def _read(folder: Path) -> dict[str, object]:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"models.draft.path: {folder.name} has no usable config.json: {error}") from error
    if not isinstance(values, dict):
        raise ModelLoadError(f"models.draft.path: {folder.name}: config.json must hold an object")
    return values
