"""Sampling fields, one by one: how they reach the engine, and which values do not."""

from __future__ import annotations

import dataclasses

import pytest

from engine.types import SamplingParams
from tests.server.fake_engine import HELLO, VOCAB, WORLD, FakeEngine
from tests.server.harness import CHAT, CHAT_URL, COMPLETION, COMPLETION_URL, Json, error_of, serving

pytestmark = pytest.mark.asyncio

GOOD: list[tuple[Json, Json]] = [
    ({"temperature": 0}, {"temperature": 0.0}),
    ({"temperature": 1e-320}, {"temperature": 0.0}),
    ({"temperature": 2}, {"temperature": 2.0}),
    ({"top_p": 1}, {"top_p": 1.0}),
    ({"top_p": 0.1}, {"top_p": 0.1}),
    ({"top_k": -1}, {"top_k": 0}),
    ({"top_k": 5}, {"top_k": 5}),
    ({"top_k": 2**31 - 1}, {"top_k": 0}),
    ({"min_p": 0.2}, {"min_p": 0.2}),
    ({"presence_penalty": -2, "frequency_penalty": 2}, {"presence_penalty": -2, "frequency_penalty": 2}),
    ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ({"min_tokens": 3, "max_tokens": 9}, {"min_tokens": 3, "max_tokens": 9}),
    ({"ignore_eos": True}, {"ignore_eos": True}),
    ({"stop_token_ids": [3, 4]}, {"stop_token_ids": (3, 4)}),
    ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
    ({"include_stop_str_in_output": True}, {"include_stop_str_in_output": True}),
    ({"skip_special_tokens": False}, {"skip_special_tokens": False}),
    ({"bad_words": ["Hello"]}, {"bad_words": ((HELLO,), (220, HELLO))}),
    ({"bad_words": [" world"]}, {"bad_words": ((WORLD,),)}),
    ({"allowed_token_ids": [3, 4, 3]}, {"allowed_token_ids": (3, 4)}),
]


@pytest.mark.parametrize("body, expected", GOOD)
@pytest.mark.parametrize("url, base", [(CHAT_URL, CHAT), (COMPLETION_URL, COMPLETION)])
async def test_values_reach_the_engine(url: str, base: Json, body: Json, expected: Json) -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        response = await client.post(url, json={**base, **body})
    assert response.status_code == 200, response.text
    sampling = dataclasses.asdict(engine.submitted[0].sampling)
    expected = {"max_tokens": 16 if url == COMPLETION_URL else 493, "seed": sampling["seed"], **expected}
    assert sampling == {**dataclasses.asdict(SamplingParams(max_tokens=1)), **expected}


async def test_envelope_fields_reach_the_engine() -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        await client.post(CHAT_URL, json={**CHAT, "priority": -3, "cache_salt": "pepper"})
    assert (engine.submitted[0].priority, engine.submitted[0].cache_salt) == (-3, "pepper")
    assert (engine.submitted[0].choice, engine.submitted[0].group) == (0, "")


BAD: dict[str, list[object]] = {
    "n": [2**31, -1, 0, "3", True, 129, 1.5, [1]],
    "max_tokens": [0, -1, 2**63, 1.5, "5", True, 10**400],
    "temperature": [-1, 2.1, "1", True, [], {}],
    "top_p": [0, 1.1, -0.1, "0.5"],
    "top_k": [-2, 1.5, 2**31, "5"],
    "min_p": [-0.1, 1.1],
    "presence_penalty": [-2.1, 2.1, "1"],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, -1, 1e-320, 101],
    "seed": [2**63, -(2**63) - 1, 1.0, "1", True],
    "logit_bias": [dict.fromkeys(map(str, range(100_000)), 1), {str(VOCAB): 1}, "x", [[1, 2]]],
    "stop_token_ids": [[-1], [VOCAB], [2**40], [True], ["1"], 7, [1] * 1025],
    "allowed_token_ids": [[], [-1], [VOCAB], [2**70], [1.0]],
    "bad_words": [[""], ["x" * 257], "word", [1], ["a"] * 1025],
    "min_tokens": [-1, "1", True, 500, 2**63],
    "ignore_eos": [1, "true", "yes"],
    "stream": ["true", 1],
    "priority": [2**31, "0", 1.5],
    "cache_salt": ["", "x" * 257, 5],
    "model": [5, ["tiny"]],
    "stream_options": [5, [], "x"],
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("url, base", [(CHAT_URL, CHAT), (COMPLETION_URL, COMPLETION)])
async def test_values_that_are_refused(url: str, base: Json, name: str) -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        for value in BAD[name]:
            error = error_of(await client.post(url, json={**base, name: value}), 400)
            assert error["param"] is not None and error["param"].startswith(name), (value, error)
            assert error["type"] == "invalid_request_error"
    assert engine.submitted == []


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "nan"])
@pytest.mark.parametrize("name", ["temperature", "top_p", "presence_penalty", "logit_bias"])
async def test_no_number_that_is_none(name: str, word: str) -> None:
    value = f'{{"5": {word}}}' if name == "logit_bias" else word
    async with serving() as client:
        response = await client.post(
            CHAT_URL,
            content=f'{{"messages": [{{"role": "user", "content": "x"}}], "{name}": {value}}}',
            headers={"content-type": "application/json"},
        )
    assert error_of(response, 400)["code"] == "invalid_json"


async def test_min_tokens_with_every_token_banned() -> None:
    async with serving() as client:
        body = {**CHAT, "min_tokens": 2, "allowed_token_ids": [HELLO], "stop_token_ids": [HELLO]}
        assert error_of(await client.post(CHAT_URL, json=body), 400)["param"] == "allowed_token_ids"


async def test_too_many_sequences() -> None:
    async with serving(max_sequences=8) as client:
        good = await client.post(COMPLETION_URL, json={"prompt": ["a"] * 4, "n": 2})
        error = error_of(await client.post(COMPLETION_URL, json={"prompt": ["a"] * 3, "n": 3}), 400)
        chat = error_of(await client.post(CHAT_URL, json={**CHAT, "n": 9}), 400)
    assert good.status_code == 200 and error["param"] == chat["param"] == "n"
