"""From names in a configuration to a pipeline over a runner."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from engine.config import ModelConfig
from engine.protocols import Drafter, Follower, ForwardRunner, Pipeline, Verifier
from engine.registry import DRAFTERS, PIPELINES, VERIFIERS, resolve


def build_drafter(config: ModelConfig, draft: Follower | None = None) -> Drafter | None:
    """The configured drafter, if there is one; `draft` is its network over its pool, where it has one.

    Raises ConfigError for a name that no table knows.
    """
    if config.draft is None:
        return None
    made = cast(Callable[..., Drafter], resolve(DRAFTERS, config.draft.drafter, "drafter"))
    return made() if draft is None else made(draft)


def build_pipeline(
    config: ModelConfig, runner: ForwardRunner, draft: Follower | None = None, drafter: Drafter | None = None
) -> Pipeline:
    """The configured pipeline, with this drafter or one that is built over `draft`.

    Raises ConfigError for a name that no table knows, and for drafts that the verifier can't take.
    """
    kind = resolve(PIPELINES, config.pipeline, "pipeline")
    drafter = drafter or build_drafter(config, draft)
    if config.draft is None or drafter is None:
        return cast(Callable[[ForwardRunner], Pipeline], kind)(runner)
    verifier = cast(Callable[[], Verifier], resolve(VERIFIERS, config.verifier.name, "verifier"))()
    speculative = cast(Callable[..., Pipeline], kind)
    most = config.draft.max_draft or drafter.most
    return speculative(runner, drafter, verifier, most, tree=config.draft.tree, sample=config.draft.sample)
