"""From a pass's logits to the tokens of masked positions, and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.diffusion import DiffusionSpec
from engine.kernels.certainty import certainty
from engine.pipelines.feeds import Feed
from engine.runtime.rng import Purpose, uniform_rows
from engine.runtime.sampler import Sampler, first_argmax, masked_spread

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Of all candidates of a step, feed by feed, on the host: what they would become, and how sure that is."""

    tokens: npt.NDArray[np.int64]
    probabilities: Floats  # of the tokens; no number where the logits are none, or where every token is banned
    measures: Floats  # what the request's rule ranks by

    def sound(self, at: slice) -> bool:
        """Are all of these numbers?"""
        return bool(np.isfinite(self.probabilities[at]).all())


class Denoiser:
    """Draws tokens for masked positions. The mask itself is never drawn."""

    def __init__(self, vocab_size: int, spec: DiffusionSpec) -> None:
        self._sampler = Sampler(vocab_size)
        self._vocab_size = vocab_size
        self._spec = spec

    def score(self, logits: Tensor, feeds: Sequence[Feed]) -> Scores:
        """`logits` [candidates of all feeds, vocabulary or more] float32; the mask's column is set to -inf in them."""
        logits = logits[:, : self._vocab_size]
        logits[:, self._spec.mask_id] = float("-inf")
        sizes = [len(feed.candidates) for feed in feeds]
        measures = [feed.canvas.rule.card.measure for feed in feeds]
        tokens, scores = self._draw(logits, feeds, sizes)
        sure = certainty(scores, tokens, {"margin", "entropy"}.intersection(measures))
        host = torch.stack((tokens.double(), *sure.values())).cpu().numpy()
        found = dict(zip(sure, host[1:], strict=True))
        ranked = found["probability"]
        for measure in set(measures) - {"probability"}:
            ours = np.repeat([name == measure for name in measures], sizes)
            ranked = np.where(ours, _order(feeds) if measure == "random" else found[measure], ranked)
        return Scores(host[0].astype(np.int64), found["probability"], ranked)

    def _draw(self, logits: Tensor, feeds: Sequence[Feed], sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Tokens [rows], and scores [rows, vocabulary] whose softmax says how sure they are."""
        plain = [feed.canvas.sampling.greedy and not feed.canvas.sampling.ruled for feed in feeds]
        if all(plain):
            return first_argmax(logits), logits
        drawn = [feed for feed, is_plain in zip(feeds, plain, strict=True) if not is_plain]
        spread = masked_spread(
            [feed.canvas.sampling for feed in drawn],
            [[(position, feed.canvas.block.step) for position in feed.candidates.tolist()] for feed in drawn],
        )
        if not any(plain):
            return self._sampler.denoise(logits, spread, tempered=self._spec.tempered)
        shaped = torch.from_numpy(np.flatnonzero(~np.repeat(plain, sizes))).to(logits.device)
        tokens, scores = first_argmax(logits), logits.clone()
        tokens[shaped], scores[shaped] = self._sampler.denoise(logits[shaped], spread, tempered=self._spec.tempered)
        return tokens, scores


def _order(feeds: Sequence[Feed]) -> Floats:
    """A uniform number for each candidate, as a function of request, position and denoise step."""
    draws = [
        feed.canvas.sampling.draw(Purpose.ORDER)._replace(position=position, step=feed.canvas.block.step)
        for feed in feeds
        for position in feed.candidates.tolist()
    ]
    return uniform_rows(draws, 1, "cpu").squeeze(1).numpy()
