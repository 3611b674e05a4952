"""Responses that are kept: read again, gone on from, cancelled, forgotten; within bounds, and for their owner alone."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from server.errors import ApiError
from server.responses.store import OVERHEAD, Kept, ResponseStore
from tests.server.fake_engine import FakeEngine
from tests.server.harness import Connection, error_of, make_app, serving, started
from tests.server.sdk import openai_client
from tests.server.test_responses import ANSWER, URL, named_events

pytestmark = pytest.mark.asyncio


def prompt_of(engine: FakeEngine) -> str:
    return engine.tokenizer.decode(engine.submitted[-1].prompt_ids, skip_special_tokens=False)


async def asked(client: AsyncOpenAI, text: str, **fields: Any) -> Any:
    return await client.responses.create(model="tiny", input=text, **fields)


async def test_retrieve_and_delete() -> None:
    async with openai_client(FakeEngine()) as client:
        first = await asked(client, "hi", top_logprobs=1)
        assert await client.responses.retrieve(first.id) == first
        await client.responses.delete(first.id)
        for gone in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
            with pytest.raises(openai.NotFoundError):
                await gone(first.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.input_items.list(first.id)


async def test_store_false_keeps_nothing() -> None:
    async with openai_client(FakeEngine()) as client:
        answer = await asked(client, "hi", store=False)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(answer.id)


async def test_a_conversation_goes_on() -> None:
    engine = FakeEngine()
    async with openai_client(engine) as client:
        first = await asked(client, "one", instructions="once")
        second = await asked(client, "two", previous_response_id=first.id)
        third = await asked(client, "three", previous_response_id=second.id, instructions="now")
        assert prompt_of(engine) == (
            f"<system>now<user>one<assistant>{ANSWER}<user>two<assistant>{ANSWER}<user>three<assistant>"
        )
        assert third.previous_response_id == second.id
        await client.responses.delete(first.id)
        await asked(client, "three", previous_response_id=second.id)  # what went on from it is whole
        assert prompt_of(engine).startswith("<user>one")
        with pytest.raises(openai.NotFoundError) as raised:
            await asked(client, "two", previous_response_id=first.id)
    assert (raised.value.param, raised.value.code) == ("previous_response_id", "previous_response_not_found")


async def test_a_conversation_goes_on_from_a_stream() -> None:
    engine = FakeEngine()
    async with openai_client(engine) as client:
        async with client.responses.stream(model="tiny", input="one") as stream:
            first = await stream.get_final_response()
        assert (await client.responses.retrieve(first.id)).output_text == ANSWER
        await asked(client, "two", previous_response_id=first.id)
    assert prompt_of(engine) == f"<user>one<assistant>{ANSWER}<user>two<assistant>"


async def test_input_items_in_pages() -> None:
    texts = [f"text {i}" for i in range(5)]
    async with openai_client(FakeEngine()) as client:
        answer = await client.responses.create(
            model="tiny", input=[{"role": "user", "content": text} for text in texts]
        )
        listed = [item async for item in client.responses.input_items.list(answer.id, limit=2, order="asc")]
        newest = await client.responses.input_items.list(answer.id, limit=1)
        with pytest.raises(openai.BadRequestError, match="after"):
            await client.responses.input_items.list(answer.id, after="no")
        with pytest.raises(openai.BadRequestError, match="limit"):
            await client.responses.input_items.list(answer.id, limit=0)
    found = [item.content[0].text for item in listed if item.type == "message" and item.content[0].type == "input_text"]
    assert found == texts and len({item.id for item in listed}) == 5
    assert newest.has_more and newest.data[0].id == listed[-1].id


async def test_nobody_reads_what_another_key_has_stored() -> None:
    async with serving(api_keys="one,two") as client:
        own, other = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        id = (await client.post(URL, json={"input": "hi"}, headers=own)).json()["id"]
        for method, path in (("GET", id), ("DELETE", id), ("POST", f"{id}/cancel"), ("GET", f"{id}/input_items")):
            error_of(await client.request(method, f"{URL}/{path}", headers=other), 404)
            error_of(await client.request(method, f"{URL}/{path}"), 401)
        body = {"input": "hi", "previous_response_id": id}
        error_of(await client.post(URL, json=body, headers=other), 404)
        assert (await client.get(f"{URL}/{id}", headers=own)).status_code == 200


async def test_the_settings_bound_the_store() -> None:
    async with serving(stored_responses=2) as client:
        ids = [(await client.post(URL, json={"input": "hi"})).json()["id"] for _ in range(3)]
        assert [(await client.get(f"{URL}/{id}")).status_code for id in ids] == [404, 200, 200]
    async with serving(stored_response_bytes=0) as client:
        id = (await client.post(URL, json={"input": "hi"})).json()["id"]
        error_of(await client.get(f"{URL}/{id}"), 404)


async def test_bytes_are_bounded_and_the_oldest_goes_first() -> None:
    store, kept = ResponseStore(10, 3 * OVERHEAD + 300), Kept(b"x" * 50, b"x" * 30, b"x" * 20)
    for name in "abc":
        store.keep("", name, kept)
    store.find("", "a")
    store.keep("", "d", kept)
    assert len(store) == 3 and store.size == 3 * kept.size
    with pytest.raises(ApiError):
        store.find("", "b")
    store.keep("", "a", Kept(b"x" * 10_000, b"", b""))  # could only stand alone, so it is not kept at all
    assert len(store) == 2 and store.size == 2 * kept.size
    assert store.forget("", "c") and not store.forget("", "c")
    assert store.size == kept.size


async def test_cancel_ends_a_stream_and_is_idempotent() -> None:
    engine = FakeEngine()
    async with started(make_app(engine)) as app:
        engine.flowing.clear()
        connection = Connection(app, URL, {"input": "hi", "stream": True})
        await connection.next()
        (begun, *_) = named_events((await connection.next())["body"].decode())
        id = begun["response"]["id"]
        running = Connection(app, f"{URL}/{id}", {}, method="GET")
        assert b'"status":"in_progress"' in await running.rest()
        cancelled = [Connection(app, f"{URL}/{id}/cancel", {}) for _ in range(2)]
        last = (await connection.rest()).decode()
        assert '"type":"response.incomplete"' in last and '"status":"cancelled"' in last
        assert [b'"status":"cancelled"' in await one.rest() for one in cancelled] == [True, True]
        assert len(engine.aborted) == 1
        engine.flowing.set()
        again = Connection(app, f"{URL}/{id}/cancel", {})
        assert b'"status":"cancelled"' in await again.rest()


async def test_cancel_when_it_has_ended_or_its_client_has_left() -> None:
    engine = FakeEngine()
    async with serving(engine) as client:
        id = (await client.post(URL, json={"input": "hi"})).json()["id"]
        error_of(await client.post(f"{URL}/{id}/cancel"), 400)
        error_of(await client.get(f"{URL}/{id}?stream=true"), 400)
    async with started(make_app(engine := FakeEngine())) as app:
        engine.flowing.clear()
        connection = Connection(app, URL, {"input": "hi", "stream": True})
        await connection.next()
        (begun, *_) = named_events((await connection.next())["body"].decode())
        await connection.leave()
        gone = Connection(app, f"{URL}/{begun['response']['id']}", {}, method="GET")
        assert (await gone.next())["status"] == 404
        await gone.rest()
        engine.flowing.set()
        await asyncio.sleep(0)
