"""What a request's `speculation` comes to at the model that serves it: its verifier, all knobs, how far they may lead.

Standard library only, and no verifier is loaded: cards say what there is to know (`engine/verification.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from engine.config import UNTRAINED_DRAFTERS, VerifierConfig
from engine.errors import ConfigError, InvalidRequest, shown
from engine.types import ModelInfo, SpeculationParams
from engine.verification import VerifierCard, knob_names

MAX_DRAFT = 1024  # what a request may name; the model's own bound holds too
DIGITS = 9  # of bounds: 1 - 0.7 is a little more than 0.3, and must be allowed where 0.3 is


def settle(asked: SpeculationParams, info: ModelInfo) -> SpeculationParams:
    """`asked` with all that a pipeline goes by: name and knobs of the verifier, `thinking`, `bias_bound`, `report`.

    A knob is the request's, else the server's where the verifier is the server's own, else the verifier's default. An
    answer that may leave the target's law always has its report. A model that drafts nothing leaves verifiers alone.
    Raises InvalidRequest that names `speculation.<field>`.
    """
    _check_types(asked)
    if not info.max_draft:
        _check_without_drafter(asked)
        return replace(asked, thinking=None, bias_bound=0.0)
    card = _card(asked.verifier or info.verifier, info)
    server = dict(info.verifier_knobs) if card.name == info.verifier else {}
    knobs = card.settle({**server, **_given(asked, card, info)})
    bound = _bound(card, knobs)
    _check_ceiling(card, dict(knobs), bound, info.max_bias)
    _check_drawing(asked, card, info)
    if asked.thinking_only and info.thinking is None:
        raise _refused("thinking_only", "is of no use here: this model's tokenizer has no tokens around its thinking")
    lossy = bound > 0 and asked.bound(info.max_draft) > 0
    return replace(
        asked,
        verifier=card.name,
        knobs=knobs,
        thinking=info.thinking if asked.thinking_only else None,
        bias_bound=bound if lossy else 0.0,
        report=asked.report or lossy,
    )


def settle_server(config: VerifierConfig, cards: Sequence[VerifierCard]) -> tuple[tuple[str, float], ...]:
    """All knobs of the server's own verifier, where a model drafts. Raises ConfigError that names the key."""
    card = next((card for card in cards if card.name == config.name), None)
    if card is None:
        why = "; diversed needs a trained head (models.verifier.head)" if config.name == "diversed" else ""
        offered = ", ".join(card.name for card in cards)
        raise ConfigError(
            f"models.verifier.name: {config.name!r} is not offered with this draft{why}; known: {offered}"
        )
    knobs = {knob.name: knob for knob in card.knobs}
    for name, value in config.knobs.items():
        if name not in knobs:
            raise ConfigError(
                f"models.verifier.knobs.{name}: unknown to {card.name}, which has {knob_names(card.knobs)}"
            )
        if problem := knobs[name].problem(value):
            raise ConfigError(f"models.verifier.knobs.{name}: {problem}, got {value!r}")
    settled = card.settle(config.knobs)
    bound = _bound(card, settled)
    if bound > round(config.max_bias, DIGITS):
        raise ConfigError(
            f"models.verifier: {card.name} as it is set may move a token's law by {bound:g}, which is more than its own"
            f" max_bias of {config.max_bias:g}"
        )
    return settled


def _check_types(asked: SpeculationParams) -> None:
    for name in ("enabled", "report", "trace", "thinking_only"):
        if type(getattr(asked, name)) is not bool:
            raise _refused(name, "must be true or false")
    if asked.sample is not None and type(asked.sample) is not bool:
        raise _refused("sample", "must be true or false")
    most = asked.max_draft
    if most is not None and (type(most) is not int or not 0 <= most <= MAX_DRAFT):
        raise _refused("max_draft", f"must be an integer between 0 and {MAX_DRAFT}")
    if type(asked.verifier) is not str:
        raise _refused("verifier", "must be the name of a verifier")
    knobs: object = asked.knobs  # of a caller who may not have read the type
    if not isinstance(knobs, tuple) or not all(_is_pair(pair) for pair in knobs):
        raise _refused("knobs", "must be pairs of a name and a number")


def _is_pair(pair: object) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)


def _check_without_drafter(asked: SpeculationParams) -> None:
    """Nothing is drafted, so that nothing can be verified: whoever asks for a way to do it hears so."""
    first = next((name for name, _ in asked.knobs), "")
    fields = {"verifier": asked.verifier, first: first, "sample": asked.sample, "thinking_only": asked.thinking_only}
    for name, wish in fields.items():
        if wish:
            raise _refused(shown(name), "does nothing here: this model is served without a drafter", supported=False)


def _card(name: str, info: ModelInfo) -> VerifierCard:
    card = next((card for card in info.verifiers if card.name == name), None)
    if card is None:
        offered = ", ".join(card.name for card in info.verifiers)
        raise _refused("verifier", f"{shown(name)!r} is not offered by this model; it has {offered}")
    return card


def _given(asked: SpeculationParams, card: VerifierCard, info: ModelInfo) -> dict[str, float]:
    """The request's own knobs, all of which the verifier has, in their bounds."""
    knobs, given = {knob.name: knob for knob in card.knobs}, {}
    for name, value in asked.knobs:
        if name not in knobs:
            owners = [other.name for other in info.verifiers if any(knob.name == name for knob in other.knobs)]
            hint = f"; it belongs to {' and '.join(owners)}" if owners else ""
            reason = f"is no knob of the verifier {card.name!r}, which has {knob_names(card.knobs)}{hint}"
            raise _refused(shown(name), reason, supported=False)
        if problem := knobs[name].problem(value):
            raise _refused(name, problem)
        if name in given:
            raise _refused(name, "is given twice")
        given[name] = value
    return given


def _bound(card: VerifierCard, knobs: Sequence[tuple[str, float]]) -> float:
    """0 only where the verifier is lossless."""
    bound = card.bound(dict(knobs))
    return round(bound, DIGITS) or bound


def _check_ceiling(card: VerifierCard, values: Mapping[str, float], bound: float, ceiling: float) -> None:
    """Refuse what might move a token's law by more than the server allows, with what would be allowed."""
    if bound <= round(ceiling, DIGITS):
        return
    law = f"this server lets a verifier move a token's law by {ceiling:.{DIGITS}g} at most"
    for knob in card.knobs:
        if knob.neutral is not None:
            low = values[knob.name] < knob.neutral
            word, limit = ("least", knob.neutral - ceiling) if low else ("most", knob.neutral + ceiling)
            own = f"{values[knob.name]:.{DIGITS}g} may move it by {bound:.{DIGITS}g}"
            reason = f"must be at {word} {limit:.{DIGITS}g}: {law}, and {own}"
            raise _refused(knob.name, reason)
    raise _refused("verifier", f"{card.name!r} sets no bound to its bias, and {law}")


def _check_drawing(asked: SpeculationParams, card: VerifierCard, info: ModelInfo) -> None:
    if not asked.sample:
        return
    if not card.drawn:
        drawing = ", ".join(card.name for card in info.verifiers if card.drawn) or "none"
        reason = f"can't be true with the verifier {card.name!r}, whose drafts are chosen; drawn ones are for {drawing}"
        raise _refused("sample", reason, supported=False)
    if info.drafter in UNTRAINED_DRAFTERS:
        raise _refused(
            "sample", f"can't be true: the drafter {info.drafter!r} has no law to draw from", supported=False
        )


def _refused(field: str, reason: str, *, supported: bool = True) -> InvalidRequest:
    name = f"speculation.{field}"
    return InvalidRequest(f"{name} {reason}", param=name, code=None if supported else "unsupported_parameter")
