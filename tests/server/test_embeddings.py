"""/v1/embeddings over a fake engine: what is asked of the engine, what comes back, and every way to get it wrong."""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any

import httpx
import pytest

from engine.errors import Overloaded
from engine.types import FinishReason, SeqUpdate
from tests.server.fake_engine import BOS, FakeEngine, make_tokenizer
from tests.server.harness import Connection, Json, error_of, make_app, serving, started
from tests.server.test_openai_sdk import connected

URL = "/v1/embeddings"
pytestmark = pytest.mark.asyncio


async def embed(client: httpx.AsyncClient, **body: Any) -> Json:
    response = await client.post(URL, json={"model": "tiny", **body})
    assert response.status_code == 200, response.text
    answer: Json = response.json()
    return answer


async def test_every_form_of_input_is_one_request_each() -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        answer = await embed(client, input=["abc", "Hello"])
        assert answer["object"] == "list" and answer["model"] == "tiny"
        assert [(row["object"], row["index"]) for row in answer["data"]] == [("embedding", 0), ("embedding", 1)]
        assert answer["data"][0]["embedding"] == [3.0, 64.0, 66.0, 1.0]
        assert answer["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
        assert (await embed(client, input="abc"))["data"] == answer["data"][:1]
        assert (await embed(client, input=[64, 65, 66]))["data"] == answer["data"][:1]
        both = await embed(client, input=[[64, 65, 66], [258]])
        assert both["data"] == answer["data"]
        readings = [request.reading for request in engine.submitted]
        assert all(reading and (reading.pooling, reading.normalize) == ("mean", True) for reading in readings)
        assert not engine.submitted[0].speculation.enabled and engine.submitted[0].sampling.max_tokens == 0


async def test_base64_is_the_same_numbers_in_little_endian() -> None:
    async with serving(FakeEngine()) as client:
        floats = (await embed(client, input="abc", encoding_format="float"))["data"][0]["embedding"]
        text = (await embed(client, input="abc", encoding_format="base64"))["data"][0]["embedding"]
        assert list(struct.unpack("<4f", base64.b64decode(text))) == floats


async def test_options_reach_the_engine() -> None:
    engine = FakeEngine(tokenizer=make_tokenizer(bos=True))
    async with serving(engine) as client:
        await embed(client, input="abc", pooling="last", normalize=False, priority=3, cache_salt="mine", user="me")
        await embed(client, input="abc", add_special_tokens=False)
        await embed(client, input="abcdef", truncate_prompt_tokens=2)
        await embed(client, input="abcdef", truncate_prompt_tokens=2, truncation_side="right")
        await embed(client, input="x" * 2000, truncate_prompt_tokens=-1)
    first, bare, left, right, whole = engine.submitted
    assert first.reading is not None and (first.reading.pooling, first.reading.normalize) == ("last", False)
    assert (first.priority, first.cache_salt, first.prompt_ids[0]) == (3, "mine", BOS)
    assert bare.prompt_ids == (64, 65, 66)
    assert left.prompt_ids == (68, 69) and right.prompt_ids == (BOS, 64) and len(whole.prompt_ids) == 512


async def test_the_sdk_reads_them_and_asks_for_base64_by_itself() -> None:
    engine = FakeEngine()
    async with connected(engine) as sdk:
        answer = await sdk.embeddings.create(model="tiny", input=["abc", "Hello"])
        assert answer.data[1].embedding == pytest.approx([1.0, 258.0, 258.0, 1.0])
        assert answer.usage.prompt_tokens == 4


WRONG: dict[str, tuple[Json, str | None, str]] = {
    "missing": ({}, "input", "missing_required_parameter"),
    "empty": ({"input": ""}, "input", "invalid_value"),
    "no inputs": ({"input": []}, "input", "invalid_value"),
    "one is empty": ({"input": ["a", ""]}, "input[1]", "invalid_value"),
    "one has no ids": ({"input": [[1], []]}, "input[1]", "invalid_value"),
    "mixed": ({"input": ["a", 1]}, "input", "invalid_type"),
    "messages": ({"input": [{"role": "user", "content": "a"}]}, "input", "invalid_type"),
    "a number": ({"input": 3}, "input", "invalid_type"),
    "foreign ids": ({"input": [1, 999]}, "input", "invalid_value"),
    "negative ids": ({"input": [-1]}, "input", "invalid_value"),
    "format": ({"input": "a", "encoding_format": "int8"}, "encoding_format", "invalid_value"),
    "dimensions": ({"input": "a", "dimensions": 64}, "dimensions", "unsupported_parameter"),
    "no dimensions": ({"input": "a", "dimensions": 0}, "dimensions", "invalid_value"),
    "pooling": ({"input": "a", "pooling": "max"}, "pooling", "invalid_value"),
    "too long": ({"input": "x" * 600}, "input", "context_length_exceeded"),
    "one too long": ({"input": ["x", "x" * 600]}, "input", "context_length_exceeded"),
    "far too long": ({"input": "x" * 100_000}, "input", "context_length_exceeded"),
    "side without a length": ({"input": "a", "truncation_side": "left"}, "truncation_side", "invalid_value"),
    "too many inputs": ({"input": ["a"] * 2049}, "input", "invalid_value"),
    "too many tokens": ({"input": ["x" * 500] * 601}, "input", "invalid_value"),
    "tools": ({"input": "a", "prompt_embeds": "x"}, "prompt_embeds", "unsupported_parameter"),
}


@pytest.mark.parametrize("what", WRONG)
async def test_a_bad_field_is_named(what: str) -> None:
    body, param, code = WRONG[what]
    engine = FakeEngine()
    async with serving(engine) as client:
        error = error_of(await client.post(URL, json={"model": "tiny", **body}), 400)
        assert (error["param"], error["code"]) == (param, code), error
        assert not engine.submitted and not len(engine.in_flight)
        assert await embed(client, input="fine")


async def test_many_inputs_go_in_waves_and_come_back_in_order() -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        answer = await embed(client, input=[[i % 256, 7] for i in range(600)])
        assert [row["embedding"][1] for row in answer["data"]] == [i % 256 for i in range(600)]
        assert answer["usage"]["prompt_tokens"] == 1200 and len(engine.submitted) == 600


async def test_errors_of_the_engine_are_those_of_every_endpoint() -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        engine.refusal = Overloaded("full", "max_num_queued_reqs")
        refused = await client.post(URL, json={"input": "a"})
        assert error_of(refused, 503)["code"] == "overloaded" and refused.headers["retry-after"]
        engine.refusal = None
        error_of(await client.post(URL, json={"input": "a", "model": "other"}), 404)
        engine.flowing.clear()
        task = asyncio.ensure_future(client.post(URL, json={"input": ["a", "b"]}))
        while len(engine.in_flight) < 2:
            await asyncio.sleep(0)
        engine.in_flight.take([SeqUpdate(engine.submitted[0].id, finish=FinishReason.ERROR, error="NaN")], 0.0)
        assert error_of(await task, 500)["code"] == "internal_error"
        assert len(engine.aborted) == 1 and not len(engine.in_flight)


async def test_a_client_that_leaves_takes_its_requests_along() -> None:
    engine = FakeEngine()
    engine.flowing.clear()
    async with started(make_app(engine)) as app:
        connection = Connection(app, URL, {"input": ["a", "b", "c"]})
        while len(engine.in_flight) < 3:
            await asyncio.sleep(0)
        await connection.leave()
    assert len(engine.aborted) == 3 and not len(engine.in_flight)
