"""Real rounds of block speculation with the verifier in training, and a record of every verified position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.protocols import (
    Delta,
    DraftAsk,
    Drafter,
    DraftProposal,
    DraftSampler,
    Pipeline,
    Scalar,
    TargetRows,
    Verdict,
    Verifier,
    VerifierHead,
)
from engine.runtime.assembly import build_drafter, build_pipeline
from engine.runtime.device_memory import size_pool
from engine.runtime.devices import prepare_torch
from engine.runtime.drafts import bind_draft, load_draft
from engine.runtime.kv_cache import block_bytes
from engine.runtime.loading import load_checked
from engine.runtime.worker import DoneHandle
from engine.types import Capacity, Request, StepPlan
from engine.verifiers.diversed import DiversedVerifier
from engine.verifiers.strict import StrictVerifier
from training.verifier.batch import Positions, join


class WatchedDrafter:
    """A drafter that remembers for whom it drafted last. See `protocols.Drafter`."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.most, self.scores = drafter.most, drafter.scores
        self.admit, self.drop, self.commit = drafter.admit, drafter.drop, drafter.commit
        self.asks: Sequence[DraftAsk] = ()

    def propose(self, asks: Sequence[DraftAsk], sampler: DraftSampler | None = None, width: int = 0) -> DraftProposal:
        self.asks = asks
        return self._drafter.propose(asks, sampler, width)


class RecordingVerifier:
    """`diversed`, with a record of what it saw and decided. See `protocols.Verifier`."""

    card = DiversedVerifier.card
    needs_laws = needs_marginal = needs_states = True
    trees = False

    def __init__(self, head: VerifierHead, drafter: WatchedDrafter) -> None:
        self._inner = DiversedVerifier(head)
        self._drafter = drafter
        self._positions: list[Positions] = []
        self._tokens: list[tuple[str, int]] = []  # request, and the index that the token at a position has in its text
        self.rounds = 0

    def verify(self, proposal: DraftProposal, target: TargetRows) -> Verdict:
        verdict = self._inner.verify(proposal, target)
        asks, tokens = self._drafter.asks, proposal.tokens
        assert len(asks) == len(tokens), "in training, all requests of a step are verified together"
        assert isinstance(proposal.law, Delta) and isinstance(proposal.marginal, Scalar)
        assert proposal.hidden is not None and target.states is not None and target.log_probs is not None
        width = tokens.shape[1]
        steps = torch.arange(width).expand_as(tokens)
        reached = ((steps <= verdict.accepted[:, None]) & (tokens >= 0)).nonzero()
        rows, places = reached.unbind(1)
        log_p = target.log_probs[rows, places, tokens[rows, places]].double()
        self._positions.append(
            Positions(
                hidden=proposal.hidden[rows, places].float(),
                states=target.states[rows, places].float(),
                place=places,
                p=log_p.exp(),
                q=proposal.marginal.probs[rows, places].double(),
                stood=places < verdict.accepted[rows],
                sequence=torch.zeros_like(places),
            )
        )
        pairs = zip(rows.tolist(), places.tolist(), strict=True)
        self._tokens += [(asks[row].request_id, asks[row].position + 1 + place) for row, place in pairs]
        self.rounds += sum(length > 0 for length in proposal.lengths)
        return verdict

    def take(self) -> tuple[Positions | None, list[tuple[str, int]], int]:
        """All positions since the last call, whose token each of them decided, and in how many rounds."""
        found = join(self._positions) if self._positions else None
        tokens, rounds = self._tokens, self.rounds
        self._positions, self._tokens, self.rounds = [], [], 0
        return found, tokens, rounds


class RolloutWorker:
    """A worker (see `protocols.Worker`) whose only relaxed verifier records."""

    def __init__(self, config: EngineConfig, folder: Path, head: VerifierHead) -> None:
        """Raises ConfigError where the drafter has nothing that a head could be trained on."""
        prepare_torch(config.parallel)
        loaded = load_checked(config.model, folder, lambda _: None, config.kv.dtype)
        draft = load_draft(config.model.draft, loaded, folder, lambda _: None)
        if draft is None or config.model.draft is None:
            raise ConfigError("--draft: a verifier's head is trained with a draft network")
        most = config.model.draft.max_draft or draft.most
        size = block_bytes(loaded.shapes, config.kv.block_size, loaded.placement.pool)
        blocks, max_len, _ = size_pool(config, loaded, size, most, draft)
        runner = loaded.runner(blocks, config.kv.block_size)
        follower = bind_draft(draft, config, blocks)
        runner.follow(follower)
        drafter = build_drafter(config.model, follower)
        assert drafter is not None
        if not drafter.scores:
            raise ConfigError(f"--draft: the drafter {config.model.draft.drafter!r} says nothing of its tokens")
        watched = WatchedDrafter(drafter)
        self.recorder = RecordingVerifier(head, watched)
        verifiers: list[Verifier] = [self.recorder, StrictVerifier()]
        self._pipeline: Pipeline = build_pipeline(config.model, runner, follower, watched, verifiers)
        traits = self._pipeline.traits
        self._capacity = Capacity(blocks, config.kv.block_size, max_len, runner.vocab_size, traits)
        self.places = most
        self.draft_width = draft.width
        self.target_width = int(loaded.adapter.config.hidden_size)

    def capacity(self) -> Capacity:
        return self._capacity

    def prepare(self, request: Request) -> None:
        """Nothing that takes time."""

    def submit(self, plan: StepPlan) -> DoneHandle:
        return DoneHandle(self._pipeline.execute(plan))

    def num_states(self) -> int:
        return self._pipeline.num_states()

    def close(self) -> None:
        """Nothing to release."""
