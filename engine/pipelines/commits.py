"""What a denoise step commits, by each request's own rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.pipelines.canvas import Chosen
from engine.pipelines.denoise import Scores
from engine.pipelines.feeds import Feed
from engine.protocols import Profile
from engine.runtime.sampler import top_logprobs

Part = tuple[Feed, slice]  # of a step's scores


def parts(feeds: Sequence[Feed]) -> Iterator[Part]:
    """Every feed with the places of its candidates among those of all feeds."""
    first = 0
    for feed in feeds:
        yield feed, slice(first, first + len(feed.candidates))
        first += len(feed.candidates)


def choose(feeds: Sequence[Feed], scores: Scores) -> Chosen:
    """Which of the candidates of all feeds are committed: what the rules say, each asked once for all its requests.

    A request with any score that is no number commits nothing.
    """
    taken = np.zeros(len(scores.tokens), dtype=np.bool_)
    by_rule: dict[str, list[Part]] = {}
    for feed, at in parts(feeds):
        if scores.sound(at):
            by_rule.setdefault(feed.canvas.rule.card.name, []).append((feed, at))
    for members in by_rule.values():
        chosen = members[0][0].canvas.rule.choose(_profile(members, scores)).numpy()
        for row, (feed, at) in zip(chosen, members, strict=True):
            taken[at] = row[: len(feed.candidates)]
            if feed.forced:
                taken[at.start] = True
    return taken


def _profile(members: Sequence[Part], scores: Scores) -> Profile:
    """The candidates of each request side by side, in the order of their positions."""
    canvases = [feed.canvas for feed, _ in members]
    sizes = np.array([len(feed.candidates) for feed, _ in members])
    candidates = np.arange(sizes.max()) < sizes[:, None]
    confidence = np.full(candidates.shape, -np.inf)
    confidence[candidates] = np.concatenate([scores.measures[at] for _, at in members])
    quota = [canvas.schedule.quota(canvas.block.step, canvas.block.begun, canvas.block.left) for canvas in canvases]
    knobs = {
        name: torch.tensor([canvas.knobs[name] for canvas in canvases], dtype=torch.float64)
        for name in canvases[0].knobs
    }
    return Profile(torch.from_numpy(confidence), torch.from_numpy(candidates), torch.tensor(quota), knobs)


def commit(feeds: Sequence[Feed], scores: Scores, taken: Chosen) -> None:
    """Put the taken tokens into the canvases. That was a denoise step of their blocks, or it opened them."""
    for feed, at in parts(feeds):
        block = feed.canvas.block
        feed.canvas.commit(feed.candidates[taken[at]], scores.tokens[at][taken[at]].tolist())
        if feed.opening:
            block.begun = block.left
        else:
            block.step += 1
            block.cached |= feed.start <= block.start and feed.stop >= block.stop


def report(feeds: Sequence[Feed], logits: Tensor, scores: Scores, taken: Chosen) -> None:
    """Keep the log-probabilities of taken tokens, under the step's own logits, for requests that want them."""
    places, rows, counts = [], [], []
    for feed, at in parts(feeds):
        wanted = feed.canvas.request.sampling.alternatives
        if wanted is not None:
            found = np.flatnonzero(taken[at])
            rows += (found + at.start).tolist()
            places += [(feed.canvas, position) for position in feed.candidates[found].tolist()]
            counts += [wanted] * len(found)
    if rows:
        tokens = torch.from_numpy(scores.tokens[rows]).to(logits.device)
        entries = top_logprobs(logits[torch.tensor(rows, device=logits.device)], tokens, counts)
        for (canvas, position), entry in zip(places, entries, strict=True):
            canvas.reports[position] = entry
