"""The referee: from the target's logits over committed and drafted tokens to each request's round.

Requests of one step may have different verifiers. Those that share one, and whose drafts came about in the same way,
drawn or chosen, are verified together, with a proposal of their own: so nobody pays for laws that others need, and no
verifier ever sees drafts of two kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import accumulate
from typing import cast

import numpy as np
import torch
from torch import Tensor

from engine.pipelines.choices import Choice
from engine.pipelines.coins import Coins
from engine.pipelines.rounds import Round, report
from engine.pipelines.states import Share
from engine.protocols import Delta, Dense, DraftProposal, PathVerifier, Rows, Scalar, TargetRows, Verdict, Verifier
from engine.runtime.sampler import Sampler, SamplingState, Spread


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Requests that are verified together: places among those that draw, rising; `whole`: all of them."""

    verifier: Verifier
    drawn: bool
    members: Sequence[int]
    whole: bool


@dataclass(frozen=True, eq=False)
class Step:
    """What is known of all drafts of a step.

    For each request in turn come the row of its last committed token, then those of its drafted ones: of `logits`
    [rows, vocabulary], of `draws` [rows], the target's own tokens (-1 where none can be drawn), and of `states`
    [rows, width], what the output head read, where a verifier wants that. `first` are the requests' first rows.
    """

    drawing: Sequence[Share]
    proposal: DraftProposal
    logits: Tensor
    draws: Sequence[int]
    states: Tensor | None
    spread: Spread
    first: Sequence[int]

    @cached_property
    def sampling(self) -> Sequence[SamplingState]:
        """What the draw of each row sees."""
        return self.spread.expand()


class Referee:
    """Has drafts verified, or draws tokens where nothing was drafted. Rows of `logits` lie as in `Step`."""

    def __init__(self, vocab_size: int) -> None:
        self._sampler = Sampler(vocab_size)

    def draw(self, drawing: Sequence[Share], logits: Tensor) -> list[Round]:
        """Plain decoding, under any verifier, without the way through tensors."""
        if not drawing:
            return []
        sampled = self._sampler.sample(logits, [share.state.sampling for share in drawing])
        drawn = enumerate(zip(sampled.tokens.tolist(), sampled.failed.tolist(), strict=True))
        rounds = [Round([], []) if failed else Round([token], [row]) for row, (token, failed) in drawn]
        report(drawing, rounds, logits)
        return rounds

    def verify(
        self, drawing: Sequence[Share], proposal: DraftProposal, logits: Tensor, states: Tensor | None = None
    ) -> list[Round]:
        """One round of each request. Their `drafts` are the tokens of `proposal`, wherever those are held."""
        spread = spread_of(drawing)
        tokens, failed = self._sampler.sample_spread(logits, spread)
        draws = tokens.masked_fill(failed, -1).tolist()
        first = [0, *accumulate(spread.counts)][:-1]
        step = Step(drawing, proposal, logits, draws, states, spread, first)
        groups, idle = grouped(drawing, isinstance(proposal.law, Dense))
        rounds = [Round([], [])] * len(drawing)
        for group in groups:
            for i, round_ in zip(group.members, self._verified(step, group), strict=True):
                rounds[i] = round_
        for i in idle:
            token = draws[first[i]]
            rounds[i] = Round([token], [first[i]]) if token >= 0 else Round([], [])
        report(drawing, rounds, logits)
        return rounds

    def _verified(self, step: Step, group: Group) -> list[Round]:
        """The rounds of a group."""
        path = getattr(group.verifier, "path", None)
        if path is not None:  # without the way through tensors
            return [_followed(step, i, cast(PathVerifier, group.verifier)) for i in group.members]
        part, device = proposal_of(step.proposal, group), step.logits.device
        parents = None if part.parents is None else part.parents.to(device)
        part = replace(part, tokens=part.tokens.to(device), parents=parents)  # some work on the host
        return _rounds(step, group.members, group.verifier.verify(part, self._target(step, group, part)))

    def _target(self, step: Step, group: Group, part: DraftProposal) -> TargetRows:
        """What the target says of a group's drafts, laid out as these are."""
        device, shape = step.logits.device, (len(part.lengths), part.tokens.shape[1] + 1)
        # Lengths are known on the host, so that nothing has to be read back from a device.
        cells = [i * shape[1] + row for i, length in enumerate(part.lengths) for row in range(length + 1)]
        at = torch.tensor(cells, dtype=torch.int64, device=device)
        rows = None if group.whole else [row for i in group.members for row in _rows(step.first[i], step.drawing[i])]
        draws = _laid_out(_taken(torch.tensor(step.draws, device=device), rows), at, shape, -1)
        verifier = group.verifier
        if not verifier.needs_laws:
            return TargetRows(draws)
        sampling = step.sampling if rows is None else [step.sampling[row] for row in rows]
        laws = self._sampler.processed_log_probs(_taken(step.logits, rows), sampling, soft=not verifier.card.lossless)
        members = [step.drawing[i] for i in group.members]
        chance = Coins([share.state.sampling for share in members], shape[1] - 1, device)
        log_probs = _laid_out(laws, at, shape, float("-inf"))
        if verifier.card.lossless:
            return TargetRows(draws, log_probs, chance)
        choices = [choice_of(share) for share in members]
        states = _laid_out(_taken(step.states, rows), at, shape, 0.0) if verifier.needs_states else None
        return TargetRows(
            draws=draws,
            log_probs=log_probs,
            chance=chance,
            knobs={
                knob.name: torch.tensor([choice.knobs[knob.name] for choice in choices], dtype=torch.float64).to(device)
                for knob in verifier.card.knobs
            },
            greedy=torch.tensor([share.state.sampling.greedy for share in members], device=device),
            free=_free(members, shape[1] - 1, device),
            states=states,
        )


def choice_of(share: Share) -> Choice:
    choice = share.state.choice
    assert choice is not None, "a pipeline that drafts knows how to verify"
    return choice


def grouped(drawing: Sequence[Share], drawn: bool) -> tuple[list[Group], list[int]]:
    """Who is verified together, and who has nothing to verify. `drawn`: those whose choice says so have drawn drafts.

    Where all drafts of a step go to one verifier they are one group, with those of no tokens that have it too: nothing
    must be sorted out then. Only drawn ones stay by themselves, for who drafted nothing has no law.
    """
    found: dict[tuple[str, bool], list[int]] = {}
    verifiers: dict[str, Verifier] = {}
    idle: list[int] = []
    for i, share in enumerate(drawing):
        choice = choice_of(share)
        verifier, weighed = choice.verifier, drawn and choice.drawn
        if not share.drafts:
            idle.append(i)
            continue
        if share.state.span is not None and not weighed and not any(share.state.span.ahead(share.drafts)):
            verifier = choice.outside
        verifiers[verifier.card.name] = verifier
        found.setdefault((verifier.card.name, weighed), []).append(i)
    if len(found) == 1:
        ((name, weighed),) = found
        if not (weighed and idle) and all(choice_of(drawing[i]).verifier is verifiers[name] for i in idle):
            return [Group(verifiers[name], weighed, range(len(drawing)), True)], []
    return [Group(verifiers[name], weighed, members, False) for (name, weighed), members in found.items()], idle


def proposal_of(proposal: DraftProposal, group: Group) -> DraftProposal:
    """The drafts of a group as a proposal of their own, with what its verifier reads."""
    law, verifier = _law(proposal, group), group.verifier
    if group.whole:
        return proposal if law is proposal.law else replace(proposal, law=law)
    assert proposal.parents is None, "only the exact verifier knows trees"
    lengths = tuple(proposal.lengths[i] for i in group.members)
    width = max(lengths)

    def taken(values: Tensor) -> Tensor:
        return values[list(group.members), :width]

    marginal, hidden = proposal.marginal, proposal.hidden
    wanted = isinstance(marginal, Scalar | Rows) and verifier.needs_marginal
    return DraftProposal(
        tokens=taken(proposal.tokens),
        lengths=lengths,
        law=Dense(law.probs[:, :width]) if isinstance(law, Dense) else law,
        marginal=type(marginal)(taken(marginal.probs)) if wanted and marginal is not None else None,
        hidden=taken(hidden) if verifier.needs_states and hidden is not None else None,
    )


def _law(proposal: DraftProposal, group: Group) -> Delta | Dense:
    """Of the group's drafts alone."""
    law = proposal.law
    if not group.drawn or isinstance(law, Delta):
        return law if isinstance(law, Delta) else Delta()
    places = {row: place for place, row in enumerate(range(len(proposal.lengths)) if law.rows is None else law.rows)}
    wanted = [places[i] for i in group.members]
    if wanted == list(range(len(places))):
        return law if law.rows is None else Dense(law.probs)
    return Dense(law.probs[wanted])


def _free(members: Sequence[Share], width: int, device: torch.device) -> Tensor | None:
    """[n, k]: at which drafted tokens a verifier may relax; None: at all."""
    spans = [share.state.span for share in members]
    if not any(span is not None for span in spans):
        return None
    free = torch.ones(len(members), width, dtype=torch.bool)
    for row, (share, span) in enumerate(zip(members, spans, strict=True)):
        if span is not None:
            free[row, : len(share.drafts)] = torch.tensor(span.ahead(share.drafts), dtype=torch.bool)
    return free.to(device)


def _rounds(step: Step, members: Sequence[int], verdict: Verdict) -> list[Round]:
    """What a group's requests commit."""
    accepted, paths, following = verdict.accepted.tolist(), verdict.path.tolist(), verdict.next_token.tolist()
    biases = None if verdict.bias is None else verdict.bias.tolist()
    rounds: list[Round] = []
    for row, i in enumerate(members):
        share, path = step.drawing[i], paths[row][: accepted[row]]
        tokens = [share.drafts[node] for node in path]
        if following[row] >= 0:
            tokens.append(following[row])
        # Where nothing can be drawn after the accepted drafts, the last of these takes the next token's place:
        # the next step comes to that row again, with nothing drafted before it, and fails there as plain decoding.
        scored = _path_rows(step.first[i], path)[: len(tokens)]
        # After a draft that stood as a whole comes the target's own token.
        bias = () if biases is None else (*biases[row][: len(share.drafts)], 0.0)[: len(tokens)]
        rounds.append(Round(tokens, scored, path, bias))
    return rounds


def _followed(step: Step, i: int, verifier: PathVerifier) -> Round:
    """The round of request i under a verifier that needs no tensors; see `_rounds`."""
    share, first = step.drawing[i], step.first[i]
    drafts, draws = share.drafts, step.draws[first : first + len(share.drafts) + 1]
    path = verifier.path(drafts, None if share.tree is None else share.tree.parents, draws)
    tokens, following = [drafts[node] for node in path], draws[path[-1] + 1 if path else 0]
    if following >= 0:
        tokens.append(following)
    return Round(tokens, _path_rows(first, path)[: len(tokens)], path)


def _path_rows(first: int, path: Sequence[int]) -> list[int]:
    return [first, *[first + 1 + node for node in path]]


def spread_of(drawing: Sequence[Share]) -> Spread:
    """The draws after the last committed token and after each drafted one, of all requests."""
    counts = [len(share.drafts) + 1 for share in drawing]
    ahead: list[int] = []  # of the last committed token
    for share, count in zip(drawing, counts, strict=True):
        ahead += range(count) if share.tree is None else (0, *share.tree.depths)
    begin = np.array([share.state.sampling.position for share in drawing], dtype=np.int64)
    return Spread(
        [share.state.sampling for share in drawing],
        counts,
        np.repeat(begin, counts) + ahead,
        cache(lambda: [state for share in drawing for state in share.ahead()]),  # grammars' masks take their time
    )


def _rows(first: int, share: Share) -> range:
    return range(first, first + len(share.drafts) + 1)


def _taken(values: Tensor | None, rows: Sequence[int] | None) -> Tensor:
    """These rows; all of them are no copy."""
    assert values is not None
    return values if rows is None else values[torch.tensor(rows, device=values.device)]


def _laid_out(values: Tensor, at: Tensor, shape: tuple[int, int], fill: float) -> Tensor:
    """Rows [m, ...] in the cells `at` of [n, k + 1, ...], `fill` in the others; no copy where there are none."""
    if len(values) == shape[0] * shape[1]:
        return values.reshape(*shape, *values.shape[1:])
    whole = values.new_full((*shape, *values.shape[1:]), fill)
    whole.flatten(0, 1)[at] = values
    return whole
