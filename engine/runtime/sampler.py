"""Draw the next token of every row of a batch. Semantics: the docstring of `SamplingParams`.

A row's token is the argmax of its processed logits plus Gumbel noise, and the noise is a function of the request and
the position (`rng`): so it does not depend on what else is in the batch, bit for bit on one kind of device. To keep
that true, no sum over the vocabulary is taken whose order could depend on the batch (`sum` and `logsumexp` do).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.kernels.choose import Chosen, choose, usable
from engine.runtime.logit_rules import NEVER
from engine.runtime.logprobs import Alternatives, prompt_logprobs, top_logprobs
from engine.runtime.rng import Draw, Purpose, gumbel_at, gumbel_rows
from engine.runtime.sampling_layout import POSITION, PURPOSE, STEP, Layout
from engine.runtime.sampling_state import SamplingState
from engine.runtime.truncation import Kept, mass_of
from engine.types import TokenLogprob

__all__ = ["Sampled", "Sampler", "SamplingState", "Spread", "masked_spread", "prompt_logprobs", "top_logprobs"]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token per row. A failed row has token 0 and no logprob: its logits held NaN or +inf, or no token may follow.

    `tokens` [n] int64 and `failed` [n] bool are on the device of the logits.
    """

    tokens: Tensor
    failed: Tensor
    logprobs: Sequence[TokenLogprob | None]


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """Several rows of each request, which stand for later positions of it: drafted ones, or masked ones.

    Request i, whose state is states[i], has counts[i] rows, one after another. Row r draws for positions[r], with this
    purpose, in the denoise step steps[r]. `expand` makes each row's own state, which rules need.
    """

    states: Sequence[SamplingState]
    counts: Sequence[int]
    positions: npt.NDArray[np.int64]
    expand: Callable[[], Sequence[SamplingState]]
    purpose: Purpose = Purpose.TARGET
    steps: npt.NDArray[np.int64] | int = 0


def masked_spread(states: Sequence[SamplingState], places: Sequence[Sequence[tuple[int, int]]]) -> Spread:
    """The draws of masked positions; `places` are each request's (position, denoise step)."""
    flat = np.array([place for some in places for place in some], dtype=np.int64).reshape(-1, 2)

    def expand() -> list[SamplingState]:
        return [
            state.masked(position, step) for state, some in zip(states, places, strict=True) for position, step in some
        ]

    return Spread(states, [*map(len, places)], flat[:, 0], expand, Purpose.DENOISE, flat[:, 1])


class Sampler:
    """Called from one thread. Keeps the layout (and so the states) of the last batch, to use it again for the next."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._layout: Layout | None = None

    def sample(
        self, logits: Tensor, states: Sequence[SamplingState], logprobs: Sequence[Alternatives | None] | None = None
    ) -> Sampled:
        """Draw the token at each state's `position`; the caller pushes it once it is committed.

        `logits` [n, vocab_size or more] float32 are only read; columns past the vocabulary are never drawn.
        `logprobs[i]` is the number of alternatives to report for row i (0: the chosen token only), or their ids; None
        for no report. Without `logprobs` there are no reports at all.
        """
        raw = logits[:, : self._vocab_size]
        tokens, failed = self._drawn(raw, states)
        return Sampled(tokens, failed, () if logprobs is None else _reports(raw, tokens, failed, logprobs))

    def sample_spread(self, logits: Tensor, spread: Spread) -> tuple[Tensor, Tensor]:
        """Tokens and failed rows, as of `sample` for the states of all rows."""
        raw = logits[:, : self._vocab_size]
        layout = self._layout_of(spread.states, logits.device)
        if layout.rules or not usable(raw):
            return self._drawn(raw, spread.expand())
        if layout.plain_greedy:
            return _chosen(raw, None, None, spread.expand)
        owners = np.repeat(np.arange(len(spread.states)), spread.counts)
        keys = layout.keys()[owners]
        keys[:, POSITION], keys[:, PURPOSE], keys[:, STEP] = spread.positions, spread.purpose, spread.steps
        return _chosen(raw, keys, layout.wishes[owners], spread.expand)

    def _drawn(self, raw: Tensor, states: Sequence[SamplingState]) -> tuple[Tensor, Tensor]:
        """Tokens [n] and which rows failed [n]."""
        layout = self._layout_of(states, raw.device)
        if not usable(raw):
            tokens, failed = _draw(raw, layout)
            return tokens.masked_fill_(failed, 0), failed
        if layout.plain_greedy:
            return _chosen(raw, None, None, lambda: states)
        if not layout.rules:
            return _chosen(raw, layout.keys(), layout.wishes, lambda: states)
        edited, _, failed = _edited(raw, layout)
        tokens, _ = _chosen(edited, layout.keys(), layout.wishes, lambda: states)
        return tokens.masked_fill_(failed, 0), failed

    def processed_log_probs(self, logits: Tensor, states: Sequence[SamplingState], *, soft: bool = False) -> Tensor:
        """The law that `sample` draws from, as log-probabilities [n, vocab_size] float32.

        Greedy rows are one-hot; if `soft`, they have their law at temperature 1, after the rules and not truncated.
        Failed rows are NaN. `logits` [n, vocab_size or more] float32 are only read.
        """
        layout = self._layout_of(states, logits.device)
        edited, largest, failed = _edited(logits[:, : self._vocab_size], layout)
        laws = torch.full(edited.shape, NEVER, device=logits.device)
        if layout.greedy and soft:
            laws[layout.greedy.rows] = layout.greedy.take(edited).log_softmax(1)
        elif layout.greedy:
            laws[layout.greedy.rows, first_argmax(layout.greedy.take(edited))] = 0.0
        if layout.free:
            laws[layout.free.rows] = layout.free.tempered(edited, largest).log_softmax(1)
        if layout.truncated:
            scores = layout.truncated.tempered(edited, largest)
            kept = layout.truncation.apply_(scores)
            left = torch.full_like(scores, NEVER)
            left[kept.rows, kept.ids] = scores[kept.rows, kept.ids]
            laws[layout.truncated.rows] = left.log_softmax(1)
        return laws.masked_fill_(failed.unsqueeze(1), float("nan"))

    def denoise(self, logits: Tensor, spread: Spread, *, tempered: bool) -> tuple[Tensor, Tensor]:
        """The token of each row as `sample` draws it, and the scores [n, vocab_size] that say how sure it is.

        The softmax of these is the law at temperature 1, after the rules and not truncated; if `tempered`, the law
        that the token is drawn from (for greedy rows there is none but the first). No number where a row failed.
        """
        tokens, _ = self.sample_spread(logits, spread)
        if tempered:
            return tokens, self.processed_log_probs(logits, spread.expand(), soft=True)
        raw = logits[:, : self._vocab_size]
        if not any(state.ruled for state in spread.states):
            return tokens, raw
        return tokens, _edited(raw, self._layout_of(spread.expand(), logits.device))[0]

    def _layout_of(self, states: Sequence[SamplingState], device: torch.device) -> Layout:
        if self._layout is None or not self._layout.fits(states, device):
            self._layout = Layout(states, self._vocab_size, device)
        return self._layout


def first_argmax(scores: Tensor) -> Tensor:
    """Index of each row's largest value [m] int64, the lowest on ties; a NaN counts as largest."""
    if scores.device.type == "cpu":
        return torch.from_numpy(choose(scores).tokens)
    return scores.argmax(dim=1)


def _chosen(
    logits: Tensor,
    keys: npt.NDArray[np.uint64] | None,
    wishes: npt.NDArray[np.float64] | None,
    states: Callable[[], Sequence[SamplingState]],
) -> tuple[Tensor, Tensor]:
    """As `_draw`, by native code, of logits that no rule is to change any more."""
    chosen = choose(logits, keys, wishes)
    failed = ~np.isfinite(chosen.largest)
    if failed.any():
        chosen.tokens[failed] = 0
    if keys is not None and wishes is not None and chosen.unsure.any():
        _resolve(logits, keys, wishes, chosen, states)
    return torch.from_numpy(chosen.tokens), torch.from_numpy(failed)


def _resolve(
    logits: Tensor,
    keys: npt.NDArray[np.uint64],
    wishes: npt.NDArray[np.float64],
    chosen: Chosen,
    states: Callable[[], Sequence[SamplingState]],
) -> None:
    """Draw the unsure rows: once more with the exact mass, where a nucleus depends on it, then without native code."""
    rows = np.flatnonzero(chosen.unsure)
    heat, floor, top_p, top_k, mass = wishes[rows].T
    again = (top_p < 1) & (top_k == 0) & (mass == 0)
    if again.any():
        part, some = rows[again], wishes[rows[again]]
        raw = logits[torch.from_numpy(part)]
        scores = raw - torch.from_numpy(chosen.largest[part]).unsqueeze(1)
        scores.div_(torch.from_numpy(heat[again].astype(np.float32)).unsqueeze(1))
        scores.masked_fill_(scores < torch.from_numpy(floor[again].astype(np.float32)).unsqueeze(1), NEVER)
        some[:, -1] = mass_of(scores).numpy()
        second = choose(raw, keys[part], some)
        chosen.tokens[part], chosen.unsure[part] = second.tokens, second.unsure
        rows = np.flatnonzero(chosen.unsure)
    if len(rows):
        known = states()
        layout = Layout([known[row] for row in rows.tolist()], logits.shape[1], logits.device, ruled=False)
        chosen.tokens[rows] = _draw(logits[torch.from_numpy(rows)], layout)[0].numpy()


def _draw(raw: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Tokens [n], with anything in the failed rows; failed [n]."""
    edited, largest, failed = _edited(raw, layout)
    tokens = torch.zeros(len(raw), dtype=torch.int64, device=raw.device)
    if layout.greedy:
        tokens[layout.greedy.rows] = first_argmax(layout.greedy.take(edited))
    if layout.free:
        scores = layout.free.tempered(edited, largest)
        scores += gumbel_rows(layout.free.draws(), scores.shape[1], scores.device)
        tokens[layout.free.rows] = first_argmax(scores)
    if layout.truncated:
        scores = layout.truncated.tempered(edited, largest)
        kept = layout.truncation.apply_(scores)
        tokens[layout.truncated.rows] = _draw_kept(scores, kept, layout.truncated.draws())
    return tokens, failed


def _edited(raw: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, V] after the rules, their largest values [n], and which rows failed [n]. `raw` is not changed."""
    largest = raw.amax(1)  # NaN where the row has one
    failed = largest.isfinite().logical_not_()
    if not layout.rules:
        return raw, largest, failed
    edited = raw.clone(memory_format=torch.contiguous_format)
    layout.rules.apply_(edited)
    largest = edited.amax(1)
    return edited, largest, failed.logical_or_(largest.isfinite().logical_not_())


def _draw_kept(scores: Tensor, kept: Kept, draws: Sequence[Draw]) -> Tensor:
    """Draw among the kept tokens of scores [m, V]; noise is made for these only where that is cheaper."""
    total = len(kept.ids)
    if total == 0:
        return torch.zeros_like(kept.sizes)
    if scores.device.type == "cpu" and scores.numel() < 400_000 + 85 * total:
        noise = gumbel_rows(draws, scores.shape[1], scores.device)[kept.rows, kept.ids]
    else:
        noise = gumbel_at(draws, kept.rows, kept.ids)
    starts = kept.sizes.cumsum(0) - kept.sizes
    table = scores.new_full((len(scores), int(kept.sizes.max())), NEVER)
    table[kept.rows, torch.arange(total, device=scores.device) - starts[kept.rows]] = (
        scores[kept.rows, kept.ids] + noise
    )
    return kept.ids[(starts + first_argmax(table)).clamp_(max=total - 1)]


def _reports(
    raw: Tensor, tokens: Tensor, failed: Tensor, wanted: Sequence[Alternatives | None]
) -> list[TokenLogprob | None]:
    """One entry per row, from the raw logits; None where none is wanted and for failed rows."""
    found: list[TokenLogprob | None] = [None] * len(wanted)
    if all(count is None for count in wanted):
        return found
    bad = failed.tolist()
    counts = {row: count for row, count in enumerate(wanted) if count is not None and not bad[row]}
    if counts:
        rows = torch.tensor(list(counts), dtype=torch.int64, device=raw.device)
        entries = top_logprobs(raw[rows], tokens[rows], list(counts.values()))
        for row, entry in zip(counts, entries, strict=True):
            found[row] = entry
    return found
