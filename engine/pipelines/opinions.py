"""What a verifier says of drafted tokens, from the logits of its pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.diffusion import DiffusionSpec
from engine.pipelines.turns import Turn
from engine.pipelines.verifying import Opinion
from engine.runtime.sampler import Sampler, first_argmax, masked_spread, top_logprobs
from engine.types import TokenLogprob

_CELLS_AT_ONCE = 1 << 18  # numbers of a float64 softmax: 2 MB


class Reviewer:
    """Draws what the verifier would have, with the noise that the drafted token was drawn with.

    So a verifier that is the drafter agrees with it at any temperature, and without a temperature its own token is
    the likeliest one. Probabilities are measured as those that rules rank by: see `DiffusionSpec.tempered`.
    """

    def __init__(self, vocab_size: int, spec: DiffusionSpec) -> None:
        self._sampler = Sampler(vocab_size)
        self._tempered = spec.tempered

    def opinions(self, turns: Sequence[Turn], logits: Tensor) -> list[list[Opinion]]:
        """For each turn, of the positions it asks about; `logits` [positions of all, vocabulary], without the mask.

        A turn whose logits are no numbers is marked as failed.
        """
        cells = [(turn, position) for turn in turns for position in turn.asked]
        if not cells:
            return [[] for _ in turns]
        drafted = [turn.state.canvas.ids[position] for turn, position in cells]
        own, scores = self._draw(turns, logits)
        tokens = torch.stack((own, torch.tensor(drafted, device=own.device)), dim=1)
        rows = max(1, _CELLS_AT_ONCE // scores.shape[1])
        parts = zip(scores.split(rows), tokens.split(rows), strict=True)
        chances = torch.cat([part.double().softmax(1).gather(1, chosen) for part, chosen in parts])
        host = torch.cat((own.double().unsqueeze(1), chances), dim=1).tolist()
        found: list[list[Opinion]] = []
        entries = iter(zip(cells, drafted, host, strict=True))
        for turn in turns:
            mine = [next(entries) for _ in turn.asked]
            turn.failed |= not all(kept == kept and chance == chance for _, _, (_, chance, kept) in mine)
            found.append([Opinion(at, old, int(new), chance, kept) for (_, at), old, (new, chance, kept) in mine])
        return found

    def _draw(self, turns: Sequence[Turn], logits: Tensor) -> tuple[Tensor, Tensor]:
        """The verifier's own tokens [n], and scores [n, vocabulary] whose softmax says how sure it is."""
        turns = [turn for turn in turns if turn.asked]
        if all(turn.state.canvas.sampling.greedy and not turn.state.canvas.sampling.ruled for turn in turns):
            return first_argmax(logits), logits
        spread = masked_spread(
            [turn.state.canvas.sampling for turn in turns],
            [[(position, turn.state.step_of(position)) for position in turn.asked] for turn in turns],
        )
        return self._sampler.denoise(logits, spread, tempered=self._tempered)


def report_placed(turns: Sequence[Turn], placed: Sequence[Sequence[Opinion]], logits: Tensor) -> None:
    """Keep the log-probabilities of the tokens that verifying put in, for requests that want them.

    `placed`: for each turn, of those positions; `logits` as above.
    """
    first, rows, cells, counts = 0, [], [], []
    for turn, changes in zip(turns, placed, strict=True):
        wanted = turn.state.canvas.request.sampling.alternatives
        if wanted is not None:
            rows += [first + turn.asked.index(opinion.position) for opinion in changes]
            cells += [(turn.state.canvas, opinion) for opinion in changes]
            counts += [wanted] * len(changes)
        first += len(turn.asked)
    if not rows:
        return
    tokens = torch.tensor([opinion.own for _, opinion in cells], device=logits.device)
    entries: list[TokenLogprob] = top_logprobs(logits[torch.tensor(rows, device=logits.device)], tokens, counts)
    for (canvas, opinion), entry in zip(cells, entries, strict=True):
        canvas.reports[opinion.position] = entry
