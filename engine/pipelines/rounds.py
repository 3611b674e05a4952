"""Rounds: from the target's logits over committed and drafted tokens to what each request commits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from engine.pipelines.coins import Coins
from engine.pipelines.states import FAILED, Share
from engine.protocols import DraftProposal, TargetRows, Verifier
from engine.runtime.sampler import Sampler, top_logprobs
from engine.types import SeqResult, TokenLogprob


@dataclass(slots=True, eq=False)
class Round:
    """What one request commits: tokens (none where not even the first can be drawn), and the rows they come from.

    `path` are the drafted tokens among these, by their index in the draft.
    """

    tokens: list[int]
    rows: list[int]
    path: Sequence[int] = ()
    foreseen: tuple[float, float] = (0.0, 0.0)  # see SeqResult
    logprobs: tuple[TokenLogprob, ...] | None = None


class Referee:
    """Has drafts verified, or draws tokens where nothing was drafted.

    In both, `logits` [rows, vocabulary] holds, for each request in turn, the row of its last committed token, then
    those of its drafted ones.
    """

    def __init__(self, verifier: Verifier, vocab_size: int) -> None:
        self._verifier = verifier
        self._sampler = Sampler(vocab_size)

    def draw(self, drawing: Sequence[Share], logits: torch.Tensor) -> list[Round]:
        """Plain decoding, under any verifier, without the way through tensors."""
        if not drawing:
            return []
        sampled = self._sampler.sample(logits, [share.state.sampling for share in drawing])
        drawn = enumerate(zip(sampled.tokens.tolist(), sampled.failed.tolist(), strict=True))
        rounds = [Round([], []) if failed else Round([token], [row]) for row, (token, failed) in drawn]
        _report(drawing, rounds, logits)
        return rounds

    def verify(self, drawing: Sequence[Share], proposal: DraftProposal, logits: torch.Tensor) -> list[Round]:
        """One round of each request. Their `drafts` are the tokens of `proposal`, wherever those are held."""
        device = logits.device
        parents = None if proposal.parents is None else proposal.parents.to(device)
        proposal = replace(proposal, tokens=proposal.tokens.to(device), parents=parents)  # some work on the host
        verdict = self._verifier.verify(proposal, self._target(drawing, proposal, logits))
        accepted, paths, following = verdict.accepted.tolist(), verdict.path.tolist(), verdict.next_token.tolist()
        rounds: list[Round] = []
        row = 0
        for i, share in enumerate(drawing):
            path = paths[i][: accepted[i]]
            tokens = [share.drafts[node] for node in path]
            if following[i] >= 0:
                tokens.append(following[i])
            # Where nothing can be drawn after the accepted drafts, the last of these takes the next token's place:
            # the next step comes to that row again, with nothing drafted before it, and fails there as plain decoding.
            scored = [row, *(row + 1 + node for node in path)][: len(tokens)]
            rounds.append(Round(tokens, scored, path))
            row += len(share.drafts) + 1
        _report(drawing, rounds, logits)
        return rounds

    def _target(self, drawing: Sequence[Share], proposal: DraftProposal, logits: torch.Tensor) -> TargetRows:
        """The target's own draws at all rows, laid out as the drafts are."""
        states = [state for share in drawing for state in share.ahead()]
        device, width = logits.device, proposal.tokens.shape[1] + 1
        # Lengths are known on the host, so that nothing has to be read back from a device.
        cells = [i * width + step for i, length in enumerate(proposal.lengths) for step in range(length + 1)]
        at = torch.tensor(cells, dtype=torch.int64, device=device)
        shape = (len(proposal.lengths), width)
        sampled = self._sampler.sample(logits, states)
        draws = torch.full(shape, -1, dtype=torch.int64, device=device)
        draws.view(-1)[at] = sampled.tokens.masked_fill(sampled.failed, -1)
        if not self._verifier.needs_laws:
            return TargetRows(draws)
        laws = self._sampler.processed_log_probs(logits, states)
        log_probs = laws.new_full((*shape, laws.shape[1]), float("-inf"))
        log_probs.flatten(0, 1)[at] = laws
        return TargetRows(draws, log_probs, Coins([share.state.sampling for share in drawing], width - 1, device))


def _report(drawing: Sequence[Share], rounds: Sequence[Round], logits: torch.Tensor) -> None:
    """Fill in the log-probabilities of the committed tokens of requests that want them."""
    rows: list[int] = []
    tokens: list[int] = []
    counts: list[int] = []
    asking = []
    for share, round_ in zip(drawing, rounds, strict=True):
        wanted = share.state.sampling.sampling.logprobs
        if wanted is not None and round_.tokens:
            asking.append(round_)
            rows += round_.rows
            tokens += round_.tokens
            counts += [wanted] * len(round_.tokens)
    if not asking:
        return
    entries = top_logprobs(logits[rows], torch.tensor(tokens, device=logits.device), counts)
    for round_ in asking:
        round_.logprobs = tuple(entries[: len(round_.tokens)])
        del entries[: len(round_.tokens)]


def commit(
    shares: Iterable[Share], rounds: Iterable[Round], prompts: dict[str, tuple[TokenLogprob, ...]]
) -> list[SeqResult]:
    """Move the states of all requests on, and say so. `rounds` are those of the shares that sample, in their order."""
    following = iter(rounds)
    results = []
    for share in shares:
        request_id, prompt = share.item.request_id, prompts.get(share.item.request_id)
        round_ = next(following) if share.samples else None
        if round_ is None or not round_.tokens:
            share.state.commit((), share.end)
            error = None if round_ is None else FAILED
            results.append(SeqResult(request_id, (), share.end, prompt_logprobs=prompt, error=error))
            continue
        accepted = len(round_.tokens) - 1
        share.state.commit(round_.tokens, share.end + accepted)
        result = SeqResult(
            request_id=request_id,
            new_tokens=tuple(round_.tokens),
            num_computed=share.end + accepted,
            logprobs=round_.logprobs,
            prompt_logprobs=prompt,
            drafted=len(share.drafts),
            accepted=accepted,
            foreseen=round_.foreseen,
            leaf=share.tree is not None and len(round_.path) > 0 and round_.path[-1] not in share.tree.parents,
        )
        results.append(result)
    return results
