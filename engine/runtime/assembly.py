"""From names in a configuration to a pipeline over a runner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from engine.config import ModelConfig
from engine.diffusion import DiffusionSpec
from engine.protocols import Drafter, Follower, ForwardRunner, Pipeline, UnmaskRule, Verifier, VerifierHead
from engine.registry import DRAFTERS, PIPELINES, RULES, VERIFIERS, resolve
from engine.speculation import settle_server
from engine.structured.grammars import Grammars

HEADED = ("diversed",)  # verifiers that are built over a trained head


def build_drafter(config: ModelConfig, draft: Follower | None = None) -> Drafter | None:
    """The configured drafter, if there is one; `draft` is its network over its pool, where it has one.

    Raises ConfigError for a name that no table knows.
    """
    if config.draft is None:
        return None
    made = cast(Callable[..., Drafter], resolve(DRAFTERS, config.draft.drafter, "drafter"))
    return made() if draft is None else made(draft)


def build_verifiers(config: ModelConfig, drafter: Drafter, head: VerifierHead | None = None) -> list[Verifier]:
    """All verifiers that work with this drafter, and with the head if there is one; the configured one comes first.

    Raises ConfigError where that is not among them, or not with the configured knobs.
    """
    resolve(VERIFIERS, config.verifier.name, "verifier (models.verifier.name)")
    made = []
    for name in VERIFIERS:
        kind = cast(Callable[..., Verifier], resolve(VERIFIERS, name, "verifier"))
        if name not in HEADED:
            made.append(kind())
        elif head is not None:
            made.append(kind(head))
    offered = [verifier for verifier in made if drafter.scores or not verifier.needs_marginal]
    settle_server(config.verifier, [verifier.card for verifier in offered])
    return sorted(offered, key=lambda verifier: verifier.card.name != config.verifier.name)


def build_pipeline(
    config: ModelConfig,
    runner: ForwardRunner,
    draft: Follower | None = None,
    drafter: Drafter | None = None,
    verifiers: Sequence[Verifier] | None = None,
    grammars: Grammars | None = None,
) -> Pipeline:
    """The configured pipeline, with this drafter, or one that is built over `draft`, and with these verifiers.

    Without `grammars` no request may have one.

    Raises ConfigError for a name that no table knows, and for drafts that the configured verifier can't take.
    """
    kind = resolve(PIPELINES, config.pipeline, "pipeline")
    drafter = drafter or build_drafter(config, draft)
    if config.draft is None or drafter is None:
        return cast(Callable[..., Pipeline], kind)(runner, grammars=grammars)
    speculative = cast(Callable[..., Pipeline], kind)
    return speculative(
        runner,
        drafter,
        verifiers or build_verifiers(config, drafter),
        config.draft.max_draft or drafter.most,
        knobs=config.verifier.knobs,
        tree=config.draft.tree,
        sample=config.draft.sample,
        grammars=grammars,
    )


def build_rules() -> dict[str, UnmaskRule]:
    """All unmask rules by name, in the order of their table: any of them goes with any diffusion model."""
    return {name: cast(Callable[[], UnmaskRule], resolve(RULES, name, "unmask rule"))() for name in RULES}


def build_denoiser(
    config: ModelConfig,
    runner: ForwardRunner,
    spec: DiffusionSpec,
    rules: dict[str, UnmaskRule],
    fast: tuple[ForwardRunner, DiffusionSpec] | None = None,
) -> Pipeline:
    """The configured pipeline over a diffusion model; `fast` is the model that drafts for it, if that is another one.

    Raises ConfigError for a name that no table knows.
    """
    kind = cast(Callable[..., Pipeline], resolve(PIPELINES, config.pipeline, "pipeline"))
    return kind(runner, spec, rules) if fast is None else kind(runner, spec, rules, *fast)
