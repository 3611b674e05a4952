"""Rounds: what each request commits in a step, and what is told of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from engine.pipelines.readings import readout_of
from engine.pipelines.states import Share
from engine.runtime.sampler import top_logprobs
from engine.types import SeqResult, TokenLogprob


@dataclass(slots=True, eq=False)
class Round:
    """What one request commits: tokens (none where not even the first can be drawn), and the rows they come from.

    `path` are the drafted tokens among these, by their index in the draft.
    """

    tokens: list[int]
    rows: list[int]
    path: Sequence[int] = ()
    bias: tuple[float, ...] = ()  # see SeqResult
    foreseen: tuple[float, float] = (0.0, 0.0)  # see SeqResult
    logprobs: tuple[TokenLogprob, ...] | None = None


def report(drawing: Sequence[Share], rounds: Sequence[Round], logits: torch.Tensor) -> None:
    """Fill in the log-probabilities of the committed tokens of requests that want them."""
    rows: list[int] = []
    tokens: list[int] = []
    counts: list[int | tuple[int, ...]] = []
    asking = []
    for share, round_ in zip(drawing, rounds, strict=True):
        wanted = share.state.sampling.sampling.alternatives
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
            found, error = readout_of(share) if round_ is None else (None, share.state.failure)
            results.append(SeqResult(request_id, (), share.end, prompt_logprobs=prompt, error=error, reading=found))
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
            bias=round_.bias,
            leaf=share.tree is not None and len(round_.path) > 0 and round_.path[-1] not in share.tree.parents,
        )
        results.append(result)
    return results
