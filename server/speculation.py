"""The `speculation` extension: what a request asks of drafting, and what its answer tells of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import zip_longest

from engine.types import ModelInfo, SpeculationParams, SpeculationReport, TokenEvent
from server.errors import ApiError, shorten
from server.schemas import Speculation, default


def speculation_params(asked: Speculation | None, info: ModelInfo) -> SpeculationParams:
    """Raises ApiError 400 for a knob that nobody declares, and for drafts where the model has no drafter."""
    asked = asked or Speculation()
    for name, value in (asked.model_extra or {}).items():
        if value is not None:
            known = ", ".join(Speculation.model_fields)
            raise _refused(shorten(name, 64), f"there is no such setting here; known: {known}")
    wanted = "enabled" if asked.enabled else "max_draft" if asked.max_draft and asked.enabled is not False else ""
    if wanted and not info.max_draft:
        raise _refused(wanted, "this model is served without a drafter")
    params = SpeculationParams(
        default(asked.enabled, True), asked.max_draft, bool(asked.report), trace=bool(asked.trace)
    )
    return replace(params, report=True) if _lossy(params, info) else params


def speculation_fields(
    info: ModelInfo, params: SpeculationParams, reports: Iterable[SpeculationReport]
) -> dict[str, object]:
    """The answer's `speculation`: sums over its choices. `histogram[a]` counts the rounds in which a tokens stood."""
    reports = tuple(reports)
    return {
        "verifier": info.verifier or None,
        "lossy": _lossy(params, info),
        "rounds": sum(report.rounds for report in reports),
        "drafted": sum(report.drafted for report in reports),
        "accepted": sum(report.accepted for report in reports),
        "histogram": [sum(counts) for counts in zip_longest(*(report.histogram for report in reports), fillvalue=0)],
    }


def trace_fields(event: TokenEvent, start: int = 0) -> dict[str, object]:
    """A choice's `speculation`, where the request asked for one: where each token came from, and where its text starts.

    `start`: characters that stand before the answer, as an echoed prompt does.
    """
    return {"origins": event.origins, "offsets": [start + offset for offset in event.offsets]}


def speculation_card(info: ModelInfo) -> dict[str, object] | None:
    """What a model's entry in /v1/models says: None where nothing is drafted."""
    if not info.max_draft:
        return None
    return {
        "drafter": info.drafter,
        "draft": info.draft or None,
        "max_draft": info.max_draft,
        "verifier": info.verifier,
        "lossy": not info.lossless,
    }


def _lossy(params: SpeculationParams, info: ModelInfo) -> bool:
    """May drafts change the law of the answer? It always says so then."""
    return not info.lossless and params.bound(info.max_draft) > 0


def _refused(knob: str, reason: str) -> ApiError:
    name = f"speculation.{knob}"
    return ApiError(400, f"Unsupported parameter: '{name}': {reason}.", param=name, code="unsupported_parameter")
