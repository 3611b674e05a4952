"""Whether steps run ahead of the host, and what that needs: a pool with a block for padding, and captured graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import cast

import torch

from engine.config import EngineConfig
from engine.models.draft_host import LoadedDraft
from engine.protocols import Pipeline
from engine.registry import RUNNING_AHEAD, resolve
from engine.runtime.cuda_graphs import buckets
from engine.runtime.device_state import Bounds
from engine.runtime.loading import LoadedModel
from engine.runtime.phases import OnPhase, phase
from engine.runtime.runner import ModelRunner
from engine.runtime.uniform_round import DeviceDraft
from engine.runtime.uniform_steps import UniformSteps

logger = logging.getLogger(__name__)
SPARE = 1  # blocks of a pool that are nobody's: what pads a batch is written there


def runs_ahead(config: EngineConfig, loaded: LoadedModel) -> bool:
    """Are uniform steps launched from state on the device? Diffusion models' steps depend on their results."""
    if loaded.diffusion is not None or config.model.graphs == "off":
        return False
    return config.model.graphs == "eager" or loaded.placement.device.type == "cuda"


def draft_scratch(config: EngineConfig, draft: LoadedDraft) -> int:
    """Blocks of a draft's pool that no sequence owns: for the reach of every row of the largest step."""
    return buckets(config.scheduler.max_num_seqs)[-1] * -(-draft.reach // config.kv.block_size)


def run_ahead(
    config: EngineConfig,
    pipeline: Pipeline,
    runner: ModelRunner,
    drafter: object,
    num_blocks: int,
    max_len: int,
    on_phase: OnPhase,
) -> Pipeline:
    """The pipeline with its uniform steps captured, or as it is where they can't be.

    The pools of the runner and its follower have SPARE blocks more than `num_blocks`. Must come before any request.
    """
    capture = config.model.graphs != "eager"
    trees = config.model.draft is not None and config.model.draft.tree > 0
    draft = drafter if isinstance(drafter, DeviceDraft) and not trees else None
    most = pipeline.traits.max_draft if draft is not None else 0
    bounds = Bounds(
        # Those that run, and those that have ended while a step of theirs was under way.
        slots=2 * config.scheduler.max_num_seqs,
        max_len=max_len,
        reach=0 if draft is None else max(most, draft.block_length - 1),
        block_size=config.kv.block_size,
        num_blocks=num_blocks,
    )
    with phase("graphs", on_phase) as note:
        device = runner.adapter.device
        before = _reserved(device)
        steps = UniformSteps(
            runner,
            bounds,
            device,
            rows=config.scheduler.max_num_seqs,
            capture=capture,
            draft=draft,
            most=most,
            max_tokens=config.scheduler.max_batched_tokens,
        )
        try:
            count = steps.prepare()
        except RuntimeError as error:  # torch.AcceleratorError, which a refused capture raises, among them
            logger.warning("steps are not captured, and run as they come: %s", str(error).strip().splitlines()[0])
            note.append("none: this model's steps can't be captured")
            return pipeline
        size = (_reserved(device) - before) / 2**20
        note.append(f"{count} steps" + (f", {size:.0f} MiB" if capture else ", not captured"))
    around = cast(Callable[..., Pipeline], resolve(RUNNING_AHEAD, "uniform", "pipeline"))
    return around(pipeline, steps)


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
