"""Answers of the real demo model that must have a form: all ways to say it, random schemas, and hostile ones."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from typing import Annotated, Literal

import httpx
import jsonschema
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from benchmarks.grammar_hostile import HOSTILE
from benchmarks.grammar_schemas import Schemas
from tests.e2e.process import ServerProcess
from tests.e2e.wire import assert_idle, complete

RANDOM, ALL_RANDOM = 10, 300
IN_FLIGHT = 16


class Person(BaseModel):
    name: Annotated[str, Field(max_length=20)]
    age: Annotated[int, Field(ge=0, le=120)]
    nickname: Annotated[str, Field(max_length=12)] | None
    colours: Annotated[list[Literal["red", "green", "blue"]], Field(max_length=3)]


@pytest.fixture(scope="module")
def sdk(demo: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(demo: ServerProcess, **fields: object) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "Describe a cat."}], "temperature": 0, "max_tokens": 160, **fields}
    return httpx.post(f"{demo.url}/v1/chat/completions", json=body, timeout=120)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    text: str = choice["message"]["content"]
    return text


def test_the_sdk_parses_an_answer_into_a_model(sdk: OpenAI) -> None:
    answer = sdk.chat.completions.parse(
        model="demo",
        messages=[{"role": "user", "content": "Anna, 31, likes red. Her friends call her Ann. Give me her as JSON."}],
        response_format=Person,
        temperature=0,
        max_tokens=200,
    )
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(message.parsed, Person)
    assert message.content is not None and message.parsed == Person.model_validate_json(message.content)


def test_the_sdk_streams_an_answer_into_a_model(sdk: OpenAI) -> None:
    with sdk.chat.completions.stream(
        model="demo",
        messages=[{"role": "user", "content": "Anna, 31, likes red. Give me her as JSON."}],
        response_format=Person,
        temperature=0,
        max_tokens=200,
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "content.delta" in kinds
    assert isinstance(final.choices[0].message.parsed, Person)


def test_each_kind_of_constraint_holds(demo: ServerProcess) -> None:
    assert isinstance(json.loads(text_of(ask(demo, response_format={"type": "json_object"}, max_tokens=400))), dict)
    assert text_of(ask(demo, structured_outputs={"choice": ["small", "smaller", "größer"]})) in (
        "small",
        "smaller",
        "größer",
    )
    assert re.fullmatch(r"[A-Z]{3}-[0-9]{4}", text_of(ask(demo, structured_outputs={"regex": "[A-Z]{3}-[0-9]{4}"})))
    gbnf = 'root ::= "<" [a-z]{3,6} ">" ("," [0-9]{2})?'
    for fields in ({"structured_outputs": {"grammar": gbnf}}, {"ebnf": gbnf}, {"grammar": gbnf}):
        assert re.fullmatch(r"<[a-z]{3,6}>(,[0-9]{2})?", text_of(ask(demo, **fields)))
    lark = 'start: WORD (" " WORD){2}\nWORD: /[a-z]{2,5}/\n'
    assert re.fullmatch(r"[a-z]{2,5}( [a-z]{2,5}){2}", text_of(ask(demo, guided_grammar=lark)))
    compact = {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 3}}
    assert " " not in text_of(ask(demo, structured_outputs={**compact, "disable_any_whitespace": True}))


def test_completions_and_several_choices_hold_too(demo: ServerProcess) -> None:
    body = {
        "prompt": ["The answer is", "So"],
        "n": 2,
        "max_tokens": 20,
        "temperature": 1,
        "seed": 5,
        "guided_regex": "(yes|no)!",
    }
    answer = httpx.post(f"{demo.url}/v1/completions", json=body, timeout=120).json()
    assert len(answer["choices"]) == 4
    for choice in answer["choices"]:
        assert choice["text"] in ("yes!", "no!") and choice["finish_reason"] == "stop"


@pytest.mark.asyncio
@pytest.mark.timeout(1800)  # 300 of them with --full
async def test_random_schemas_hold(demo: ServerProcess, full: bool) -> None:
    """With neither temperature nor a word about JSON in the prompt; many requests at a time."""
    source, slots = Schemas(seed=8), asyncio.Semaphore(IN_FLIGHT)
    schemas = [source.one() for _ in range(ALL_RANDOM if full else RANDOM)]

    async def one(client: httpx.AsyncClient, schema: dict[str, object], seed: int) -> bool:
        body = {
            "messages": [{"role": "user", "content": "Tell me about the sea."}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "random", "schema": schema}},
            **{"max_tokens": 160, "seed": seed, "temperature": seed % 2},
        }
        async with slots:
            response = await client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        if choice["finish_reason"] == "stop":
            jsonschema.Draft202012Validator(schema).validate(json.loads(choice["message"]["content"]))
        return bool(choice["finish_reason"] == "stop")

    async with httpx.AsyncClient(base_url=demo.url, timeout=600) as client:
        stopped = await asyncio.gather(*(one(client, schema, seed) for seed, schema in enumerate(schemas)))
    assert sum(stopped) >= 0.5 * len(schemas)


FIELDS = {"json": "guided_json", "regex": "guided_regex", "lark": "guided_grammar"}


def test_hostile_constraints_are_refused_or_followed_and_leave_the_server_well(demo: ServerProcess, full: bool) -> None:
    engine, before = demo.engine_pid, complete(demo.url, "as ever", max_tokens=3)
    cases = HOSTILE if full else [case for case in HOSTILE if case.refused is not False][::3]
    for case in cases:
        began = time.monotonic()
        fields: dict[str, object] = {FIELDS[case.kind]: case.text}
        response = ask(demo, max_tokens=4, **fields)
        assert response.status_code in ((400,) if case.refused else (200, 400, 500)), (case.name, response.text)
        if response.status_code == 400:
            assert response.json()["error"]["param"] == FIELDS[case.kind]
        elif response.status_code == 500:
            assert response.json()["error"]["code"] == "internal_error"
        assert time.monotonic() - began < 60, case.name
        assert httpx.get(f"{demo.url}/health", timeout=10).status_code == 200
    assert complete(demo.url, "as ever", max_tokens=3) == before
    assert demo.engine_pid == engine
    assert_idle(demo.url)
