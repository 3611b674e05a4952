"""Which verifier decides about a request's drafts, with which settings: settled when the request comes in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.errors import ConfigError
from engine.protocols import Verifier
from engine.types import SpeculationParams


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """`verifier` is the one in effect: a relaxed one whose knobs leave it nothing to relax is the exact one.

    `knobs` are all of its settings. `drawn`: the request's drafts are drawn. `temperature` is that of the marginal
    which the verifier wants of chosen drafts, 0 for none. `thinking`: the tokens around the span inside of which alone
    it may relax, with `outside` in its place elsewhere; None is everywhere.
    """

    verifier: Verifier
    outside: Verifier
    knobs: Mapping[str, float] = field(default_factory=dict)
    drawn: bool = False
    temperature: float = 0.0
    thinking: tuple[int, int] | None = None


class Menu:
    """The verifiers that requests may name. The first is for those that name none, with these `knobs`."""

    def __init__(self, verifiers: Sequence[Verifier], knobs: Mapping[str, float], *, sample: bool, tree: bool) -> None:
        """`sample`: drafts are drawn where a request does not say otherwise; `tree`: drafts may be trees.

        Raises ConfigError where the first verifier has no use for these.
        """
        self._table = {verifier.card.name: verifier for verifier in verifiers}
        self._default, self._knobs, self._sample = verifiers[0], knobs, sample
        self._exact = next((verifier for verifier in verifiers if verifier.card.exact), None)
        assert self._exact or all(verifier.card.lossless for verifier in verifiers), "relaxed ones need the exact one"
        first = self.choose(SpeculationParams(), 1.0).verifier
        if tree and not first.trees:
            raise ConfigError("models.draft.tree: the verifier of models.verifier.name verifies chains only")
        if sample and not first.card.drawn:
            reason = "the verifier of models.verifier.name weighs no laws; drawn drafts only lose"
            raise ConfigError(f"models.draft.sample: {reason}")

    def choose(self, params: SpeculationParams, temperature: float) -> Choice:
        """For a request with such a temperature, 0 where it is greedy; it was checked against the verifiers' cards."""
        verifier = self._table[params.verifier] if params.verifier else self._default
        card = verifier.card
        knobs = dict(card.settle(dict(params.knobs) if params.verifier else self._knobs))
        exact, thinking = self._exact, None
        if exact is not None and not card.lossless:
            thinking = params.thinking if params.thinking_only else None
            if card.bound(knobs) == 0 or (params.thinking_only and thinking is None):
                return Choice(exact, exact)
        sample = self._sample if params.sample is None else params.sample
        drawn = sample and temperature > 0 and card.drawn
        wanted = (temperature or 1.0) if verifier.needs_marginal and not drawn else 0.0
        return Choice(verifier, exact or verifier, knobs, drawn, wanted, thinking)


class ThinkingSpan:
    """Does the next token of a text lie inside its thinking span: between these two tokens, or is it the last one?"""

    def __init__(self, around: tuple[int, int], tokens: Sequence[int]) -> None:
        self._begin, self._end = around
        self.inside = next((token != self._end for token in reversed(tokens) if token in around), False)

    def push(self, token: int) -> None:
        self.inside = self._after(token, self.inside)

    def ahead(self, tokens: Sequence[int]) -> list[bool]:
        """Of tokens that may follow, one after another: which of them lie inside?"""
        inside, found = self.inside, []
        for token in tokens:
            found.append(inside)
            inside = self._after(token, inside)
        return found

    def _after(self, token: int, inside: bool) -> bool:
        return (inside or token == self._begin) and token != self._end
