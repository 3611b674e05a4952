"""What `python -m benchmarks.grammars` measures with: schemas, keywords and judgements."""

from __future__ import annotations

import json
from collections.abc import Sequence

import jsonschema
import pytest

from benchmarks import grammars
from benchmarks.grammar_hostile import HOSTILE
from benchmarks.grammar_keywords import KEYWORDS, Keyword
from benchmarks.grammar_runs import Found, Runner
from benchmarks.grammar_schemas import Schemas


class Told(Runner):
    """A library that does as it is told: what it finds for each text."""

    def __init__(self, found: Found) -> None:
        super().__init__("told")
        self.found = found

    def run(
        self, kind: str, text: str, *, steps: int, seed: int = 0, seconds: float, accept: Sequence[str] = ()
    ) -> Found:
        return self.found


@pytest.mark.parametrize("keyword", KEYWORDS, ids=lambda keyword: keyword.name)
def test_instances_are_what_they_are_said_to_be(keyword: Keyword) -> None:
    jsonschema.Draft202012Validator.check_schema(keyword.schema)
    plain = jsonschema.Draft202012Validator(keyword.schema)
    assert plain.is_valid(keyword.good)
    assert "format" in keyword.schema or not plain.is_valid(keyword.bad)


def test_random_schemas_are_schemas_and_come_again() -> None:
    first, again = Schemas(5), Schemas(5)
    schemas = [first.one() for _ in range(50)]
    assert schemas == [again.one() for _ in range(50)]
    for schema in schemas:
        jsonschema.Draft202012Validator.check_schema(schema)
    text = json.dumps(schemas)
    for keyword in (
        "$ref",
        "anyOf",
        "allOf",
        "oneOf",
        "enum",
        "const",
        "pattern",
        "format",
        "multipleOf",
        "prefixItems",
    ):
        assert f'"{keyword}"' in text


def test_hostile_cases_have_names_of_their_own() -> None:
    assert len({(case.kind, case.name) for case in HOSTILE}) == len(HOSTILE) > 80


def test_answers_are_judged_by_their_schema() -> None:
    schema: dict[str, object] = {"type": "integer", "minimum": 3}
    assert [grammars.judged(schema, text) for text in ("3", "2", "x", "3.5")] == [
        "valid",
        "invalid",
        "invalid",
        "invalid",
    ]


def test_outcomes_are_counted() -> None:
    whole: Found = {
        "compile": 0.002,
        "masks": [1e-5, 3e-5],
        "text": "3",
        "ended": True,
        "accepted": [True, False],
        "mib": 1.0,
    }
    schemas: list[dict[str, object]] = [{"type": "integer"}, {"type": "string"}]
    found = grammars.followed(Told(whole), schemas)
    assert found["outcomes"] == {"valid": 1, "invalid": 1}
    assert found["compile_ms"] == {"median": 2.0, "p99": 2.0, "worst": 2.0}
    assert found["mask_us"] == {"median": 20.0, "p99": 30.0, "worst": 30.0}
    assert grammars.keywords(Told(whole))["keyword_counts"] == {"enforced": len(KEYWORDS)}
    assert grammars.keywords(Told({**whole, "accepted": [True, True]}))["keyword_counts"] == {"ignored": len(KEYWORDS)}
    assert grammars.keywords(Told({"refused": "no", "compile": 0.1}))["keyword_counts"] == {"refused": len(KEYWORDS)}
    outcomes: tuple[tuple[str, Found], ...] = (
        ("followed", whole),
        ("slow", {**whole, "compile": 3.0}),
        ("large", {**whole, "mib": 900.0}),
        ("refused", {"refused": "no", "compile": 0.1}),
        ("crash", {"failure": "crash"}),
    )
    for outcome, what in outcomes:
        assert grammars.safety(Told(what))["hostile_counts"] == {outcome: len(HOSTILE)}
