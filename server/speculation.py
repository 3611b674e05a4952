"""The `speculation` extension: what a request asks of drafting, and what its answer tells of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from itertools import zip_longest

from engine.types import ModelInfo, SpeculationParams, SpeculationReport, TokenEvent
from engine.verification import VerifierCard
from server.errors import ApiError, refused, shorten
from server.schemas import KNOBS, Speculation, default

DIGITS = 6  # of numbers that are estimates


def speculation_params(asked: Speculation | None, info: ModelInfo) -> SpeculationParams:
    """What the client asks for, to be checked and completed by the engine (`engine/speculation.py`).

    Raises ApiError 400 for a knob that nobody declares, and for drafts where the model has no drafter.
    """
    asked = asked or Speculation()
    declared = {*KNOBS, *(knob.name for card in info.verifiers for knob in card.knobs)}
    knobs = {name: value for name in KNOBS if (value := getattr(asked, name)) is not None}
    for name, value in (asked.model_extra or {}).items():
        if value is None:
            continue
        if name not in declared:
            known = ", ".join(Speculation.model_fields)
            raise _refused(shorten(name, 64), f"there is no such setting here; known: {known}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            where = f"speculation.{name}"
            raise ApiError(400, f"Invalid value for '{where}': must be a number.", param=where, code="invalid_type")
        knobs[name] = value
    wanted = "enabled" if asked.enabled else "max_draft" if asked.max_draft and asked.enabled is not False else ""
    if wanted and not info.max_draft:
        raise _refused(wanted, "this model is served without a drafter")
    return SpeculationParams(
        enabled=default(asked.enabled, True),
        max_draft=asked.max_draft,
        report=bool(asked.report),
        trace=bool(asked.trace),
        verifier=asked.verifier or "",
        knobs=tuple(knobs.items()),
        sample=asked.sample,
        thinking_only=bool(asked.thinking_only),
    )


def speculation_fields(reports: Iterable[SpeculationReport]) -> dict[str, object]:
    """The answer's `speculation`: sums over its choices. `histogram[a]` counts the rounds in which a tokens stood."""
    reports = tuple(reports)
    first, tokens = reports[0], sum(report.tokens for report in reports)  # choices differ in nothing that is settled
    return {
        "verifier": first.verifier or None,
        "knobs": dict(first.knobs),
        "lossy": first.bias_bound != 0,
        "decoder": first.decoder,
        "rounds": sum(report.rounds for report in reports),
        "drafted": sum(report.drafted for report in reports),
        "accepted": sum(report.accepted for report in reports),
        "histogram": [sum(counts) for counts in zip_longest(*(report.histogram for report in reports), fillvalue=0)],
        "bias": round(sum(report.bias for report in reports) / tokens, DIGITS) if tokens else 0.0,
        "bias_bound": first.bias_bound,
    }


def trace_fields(event: TokenEvent, start: int = 0) -> dict[str, object]:
    """A choice's `speculation`, where the request asked for one: where each token came from, and where its text starts.

    `rounds` has [drafted, stood] of each draft that was verified. `start`: characters that stand before the answer, as
    an echoed prompt does.
    """
    offsets = [start + offset for offset in event.offsets]
    return {"origins": event.origins, "offsets": offsets, "rounds": event.rounds or ()}


def speculation_card(info: ModelInfo) -> dict[str, object] | None:
    """What a model's entry in /v1/models says: None where nothing is drafted."""
    if not info.max_draft:
        return None
    knobs = dict(info.verifier_knobs)
    return {
        "drafter": info.drafter,
        "draft": info.draft or None,
        "max_draft": info.max_draft,
        "sample": info.sample,
        "verifier": info.verifier,
        "knobs": knobs,
        "lossy": any(card.bound(knobs) > 0 for card in info.verifiers if card.name == info.verifier),
        "max_bias": info.max_bias,
        "head": info.verifier_head or None,
        "verifiers": [_verifier_card(card, info) for card in info.verifiers if card.reachable(info.max_bias)],
    }


def verifies_exactly(params: SpeculationParams, info: ModelInfo) -> bool:
    """Does a seeded answer to this request not depend on what is drafted?"""
    name = params.verifier or info.verifier
    card = next((card for card in info.verifiers if card.name == name), None)
    if card is None or card.exact or not params.bound(info.max_draft):
        return True
    server = dict(info.verifier_knobs) if name == info.verifier else {}
    return not card.lossless and card.bound({**server, **dict(params.knobs)}) == 0


def _verifier_card(card: VerifierCard, info: ModelInfo) -> dict[str, object]:
    """`default` is what a request gets that does not say."""
    server = dict(info.verifier_knobs) if card.name == info.verifier else {}
    knobs = [{**asdict(knob), "default": server.get(knob.name, knob.default)} for knob in card.knobs]
    return {
        "name": card.name,
        "text": card.text,
        "lossless": card.lossless,
        "exact": card.exact,
        "drawn": card.drawn,
        "knobs": knobs,
    }


def _refused(knob: str, reason: str) -> ApiError:
    return refused(f"speculation.{knob}", reason)
