"""The two endpoints' questions and answers, from their own words to ours and back."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence

from server.answers import Fields
from server.decisions.asking import Case
from server.decisions.evidence import transcript
from server.decisions.questions import MAX_CHOICES, MAX_LEVELS, Question, Weighed, choice, score, yes_or_no
from server.decisions.schemas import AskingBody, DecisionBody, DecisionQuestion, SystemOneBody, SystemQuestion, shown
from server.errors import invalid
from server.reads import Read


def _template(body: AskingBody) -> dict[str, object]:
    template = dict(body.chat_template_kwargs or {})
    if template.get("enable_thinking"):
        raise invalid(
            "chat_template_kwargs.enable_thinking", "an answer is the first token of the reply, not a thought"
        )
    return template


# ---- /v1/decisions ---------------------------------------------------------------------------------------


def decision_case(body: DecisionBody) -> Case:
    """Raises ApiError."""
    evidence = transcript(body.input)
    if not evidence.strip():
        raise invalid("input", "is empty")
    return Case(
        evidence,
        [_decision_question(question, f"questions[{i}]") for i, question in enumerate(body.questions)],
        "input",
        template=_template(body),
        joint=bool(body.joint),
        cache_salt=body.prompt_cache_key or "",
        priority=body.priority or 0,
    )


def _decision_question(asked: DecisionQuestion, where: str) -> Question:
    if not asked.instructions.strip():
        raise invalid(f"{where}.instructions", "must not be empty")
    for field, owner in (("choices", "choice"), ("levels", "score")):
        if (getattr(asked, field) is not None) is not (asked.type == owner):
            verb = "needs" if asked.type == owner else "has no"
            raise invalid(f"{where}.{field}", f"a question of type '{asked.type}' {verb} '{field}'")
    if asked.choices is not None:
        values = [(type(option.value), option.value) for option in asked.choices]
        if len(set(values)) < len(values):
            raise invalid(f"{where}.choices", "each value must be there once")
        named = [(_shown(option.value), option.description or "") for option in asked.choices]
        return choice(where, asked.instructions, named)
    if asked.levels is not None:
        return score(where, asked.instructions, [(level.label, level.description or "") for level in asked.levels])
    return yes_or_no(where, asked.instructions)


def _shown(value: str | bool) -> str:
    return value if isinstance(value, str) else str(value).lower()


def decision_answer(body: DecisionBody, model: str, weighed: Sequence[Weighed], reads: Sequence[Read]) -> Fields:
    tokens, cached = _tokens(reads)
    fields: Fields = {
        "answers": [_decided(asked, found) for asked, found in zip(body.questions, weighed, strict=True)],
        "model": model,
        "usage": {
            "input_tokens": tokens,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": tokens,
        },
    }
    return fields | ({"diagnostics": [_diagnosis(found) for found in weighed]} if body.diagnostics else {})


def _decided(asked: DecisionQuestion, found: Weighed) -> Fields:
    head: Fields = {"type": asked.type, "name": asked.name}
    if asked.choices is not None:
        return head | {
            "choice": asked.choices[found.best].value,
            "confidence": found.confidence,
            "probabilities": [
                {"value": option.value, "probability": share}
                for option, share in zip(asked.choices, found.probabilities, strict=True)
            ],
        }
    if asked.levels is not None:
        return head | {
            "score": found.expected,
            "confidence": found.confidence,
            "probabilities": [
                {"label": level.label, "value": value, "probability": share}
                for value, (level, share) in enumerate(zip(asked.levels, found.probabilities, strict=True))
            ],
        }
    return head | {"probability": found.probabilities[0]}


# ---- /v1/systemone ---------------------------------------------------------------------------------------


def system_case(body: SystemOneBody) -> Case:
    """Raises ApiError."""
    return Case(
        body.state,
        [_system_question(asked, f"questions.{name}") for name, asked in body.questions.items()],
        "state",
        instructions=body.instructions or "",
        template=_template(body),
        joint=bool(body.joint),
        cache_salt=body.cache_salt or "",
        priority=body.priority or 0,
    )


def _system_question(asked: SystemQuestion, where: str) -> Question:
    criteria, where_criteria = asked.criteria, f"{where}.criteria"
    match asked.type:
        case "choice":
            if not isinstance(criteria, dict) or not 1 <= len(criteria) <= MAX_CHOICES:
                raise invalid(where_criteria, f"a choice needs an object of 1 to {MAX_CHOICES} options")
            return choice(where, asked.instructions, [(name, shown(text)) for name, text in criteria.items()])
        case "score":
            if not isinstance(criteria, list) or not 2 <= len(criteria) <= MAX_LEVELS:
                raise invalid(where_criteria, f"a score needs a list of 2 to {MAX_LEVELS} levels")
            return score(where, asked.instructions, [(shown(level), "") for level in criteria])
    if criteria is not None and not (isinstance(criteria, dict) and criteria.keys() <= {"true", "false"}):
        raise invalid(where_criteria, "a noul may have an object with 'true' and 'false'")
    sides = criteria if isinstance(criteria, dict) else {}
    return yes_or_no(where, asked.instructions, shown(sides.get("true")), shown(sides.get("false")))


def system_answer(body: SystemOneBody, model: str, weighed: Sequence[Weighed], reads: Sequence[Read]) -> Fields:
    tokens, _ = _tokens(reads)
    found = dict(zip(body.questions, weighed, strict=True))
    return {
        "id": f"decision-{secrets.token_hex(16)}",
        "object": "structured_decision",
        "created": int(time.time()),
        "model": model,
        "answers": {name: dict(_system_answered(asked, found[name])) for name, asked in body.questions.items()},
        "usage": {"input_tokens": tokens, "output_tokens": 0},
        "diagnostics": {name: _diagnosis(own) for name, own in found.items()},
    }


def _system_answered(asked: SystemQuestion, found: Weighed) -> Iterator[tuple[str, object]]:
    shares = found.probabilities
    yield "type", asked.type
    if asked.type == "choice":
        names = list(asked.criteria or ())
        yield "choice", names[found.best]
        yield "probabilities", dict(zip(names, shares, strict=True))
    elif asked.type == "score":
        yield "score", found.expected
        yield "legend", {str(place): level for place, level in enumerate(asked.criteria or ())}
        yield "probabilities", {str(place): share for place, share in enumerate(shares)}
    else:
        yield "noul", shares[0]
        yield "probabilities", {"yes": shares[0], "no": shares[1]}
    yield "confidence", found.confidence


def _diagnosis(found: Weighed) -> Fields:
    return {"label_mass": found.mass, "argmax_is_label": found.best_is_label}


def _tokens(reads: Sequence[Read]) -> tuple[int, int]:
    """Of all prompts, and how many of these were found in the cache."""
    return sum(read.usage.prompt_tokens for read in reads), sum(read.usage.cached_tokens for read in reads)
