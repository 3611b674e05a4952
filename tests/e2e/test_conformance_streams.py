"""Points 1 to 16 of the wire's conformance list: server-sent events and chunks, over real sockets."""

from __future__ import annotations

import json
import threading
from typing import Any

import openai
import pytest

from tests.e2e.process import ServerProcess, wait_until
from tests.e2e.scripted import ScriptedServer
from tests.e2e.streams import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    body_of,
    chunks,
    client_of,
    of_choice,
    text_of,
    whole,
    wire_text,
)
from tests.e2e.wire import error_of, http
from tests.server.fake_engine import EOS, FakeEngine

PATHS = pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
Scripted = ScriptedServer


@PATHS
def test_point_01_each_event_is_one_line_and_a_blank_one(scripted: Scripted, path: str) -> None:
    scripted.engine.answer = "a\n\nb\r\nc\u2028d"
    with http().stream("POST", f"{scripted.url}{path}", json=body_of(path, stream=True)) as response:
        assert response.headers["content-type"].partition(";")[0] == "text/event-stream"
        text = b"".join(response.iter_raw()).decode()
    assert text.endswith("\n\n")
    for event in text[:-2].split("\n\n"):
        assert event.startswith("data: ") and "\n" not in event and "\r" not in event
    assert text_of(chunks(scripted, path)) == scripted.engine.answer


@PATHS
def test_point_02_the_last_event_is_done(scripted: Scripted, path: str) -> None:
    text = wire_text(scripted, path)
    assert text.endswith("\n\ndata: [DONE]\n\n") and text.count("[DONE]") == 1
    failed = _failing(scripted, path)
    assert failed.endswith("\n\ndata: [DONE]\n\n") and failed.count("[DONE]") == 1


def _failing(scripted: Scripted, path: str) -> str:
    """A stream whose request fails in the middle."""
    engine = scripted.engine
    scripted.later(engine.flowing.clear)
    before = len(engine.submitted)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(wire_text(scripted, path)))
    reader.start()
    wait_until(lambda: len(engine.submitted) > before, "the request")
    scripted.later(lambda: engine.error(engine.submitted[-1].id))
    reader.join(20)
    scripted.later(scripted.engine.flowing.set)
    return found[0]


@PATHS
def test_point_03_silence_is_filled_with_comments(path: str) -> None:
    with ScriptedServer(FakeEngine(), keep_alive_seconds=0.02) as server:
        server.later(server.engine.flowing.clear)
        with http().stream("POST", f"{server.url}{path}", json=body_of(path, stream=True)) as response:
            lines = response.iter_lines()
            assert any(line == ": keep-alive" for line in lines)
            server.later(server.engine.flowing.set)
            assert "data: [DONE]" in [*lines]
        server.later(server.engine.flowing.clear)
        with client_of(server) as client:
            stream = client.completions.create(model="tiny", prompt="x", stream=True)
            server.later(server.engine.flowing.set)
            assert "".join(chunk.choices[0].text for chunk in stream) == "Hello, wörld!"


def test_point_04_nothing_buffers_the_first_chunk(scripted: Scripted) -> None:
    scripted.later(scripted.engine.flowing.clear)
    with http().stream("POST", f"{scripted.url}{CHAT}", json=body_of(CHAT, stream=True)) as response:
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        assert "content-encoding" not in response.headers and "content-length" not in response.headers
        first = next(response.iter_lines())  # before there is any token
        assert json.loads(first.removeprefix("data: "))["choices"][0]["delta"]["role"] == "assistant"
        scripted.later(scripted.engine.flowing.set)


def test_point_05_an_error_in_a_stream_is_an_event(scripted: Scripted) -> None:
    events = _failing(scripted, CHAT).split("\n\n")
    error = json.loads(events[-3].removeprefix("data: "))
    assert set(error) == {"error"} and isinstance(error["error"]["message"], str)
    assert set(error["error"]) == {"message", "type", "param", "code"}
    scripted.later(scripted.engine.flowing.clear)
    with client_of(scripted) as client:
        before = len(scripted.engine.submitted)
        stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        wait_until(lambda: len(scripted.engine.submitted) > before, "the request")
        scripted.later(lambda: scripted.engine.error(scripted.engine.submitted[-1].id))
        with pytest.raises(openai.APIError, match="The model failed"):
            list(stream)
    scripted.later(scripted.engine.flowing.set)


@pytest.mark.parametrize(
    "fields, status",
    [({"max_tokens": 0}, 400), ({"model": "other"}, 404), ({"stop": [""]}, 400), ({"temperature": -1}, 400)],
)
@PATHS
def test_point_06_what_is_known_before_is_an_http_error(
    tiny: ServerProcess, path: str, fields: dict[str, Any], status: int
) -> None:
    response = http().post(f"{tiny.url}{path}", json=body_of(path, stream=True, **fields))
    assert response.status_code == status
    error_of(response)


def test_point_06_a_prompt_that_is_too_long_is_an_http_error(tiny: ServerProcess) -> None:
    response = http().post(f"{tiny.url}{COMPLETIONS}", json={"prompt": "x" * 600, "stream": True})
    assert error_of(response)["code"] == "context_length_exceeded"


@PATHS
def test_point_07_all_chunks_have_one_head(tiny: ServerProcess, path: str) -> None:
    events = chunks(tiny, path, n=2, max_tokens=5, stream_options={"include_usage": True})
    heads = {(event["id"], event["object"], event["created"], event["model"]) for event in events}
    ((name, kind, created, model),) = heads
    assert kind == ("chat.completion.chunk" if path == CHAT else "text_completion")
    assert type(created) is int and model == "tiny"
    assert name.startswith("chatcmpl-" if path == CHAT else "cmpl-")


@pytest.mark.parametrize("n", [1, 3])
def test_point_08_each_choice_begins_with_its_role(tiny: ServerProcess, n: int) -> None:
    events = chunks(tiny, CHAT, n=n, max_tokens=5)
    for index in range(n):
        first = of_choice(events, index)[0]
        assert first["delta"] == {"role": "assistant", "content": ""} and first["finish_reason"] is None
    assert sum("role" in choice["delta"] for event in events for choice in event["choices"]) == n


def test_point_09_chunks_in_the_middle_have_content_alone(tiny: ServerProcess) -> None:
    for choice in of_choice(chunks(tiny, CHAT, max_tokens=12))[1:-1]:
        assert set(choice["delta"]) == {"content"} and isinstance(choice["delta"]["content"], str)
        assert choice["finish_reason"] is None


@PATHS
def test_point_10_each_choice_ends_once(tiny: ServerProcess, path: str) -> None:
    events = chunks(tiny, path, n=3, max_tokens=6)
    for index in range(3):
        ends = [choice["finish_reason"] for choice in of_choice(events, index)]
        assert ends[-1] in ("stop", "length") and set(ends[:-1]) <= {None}


@PATHS
def test_point_11_usage_comes_in_a_chunk_of_its_own_and_when_asked(tiny: ServerProcess, path: str) -> None:
    for fields in ({}, {"stream_options": {"include_usage": False}}, {"stream_options": None}):
        assert all(event["choices"] and "usage" not in event for event in chunks(tiny, path, max_tokens=4, **fields))
    *events, last = chunks(tiny, path, max_tokens=4, stream_options={"include_usage": True})
    assert all(event["choices"] and event["usage"] is None for event in events)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4


@PATHS
def test_point_12_stream_options_need_a_stream(tiny: ServerProcess, path: str) -> None:
    for fields in ({}, {"stream": False}):
        body = body_of(path, stream_options={"include_usage": True}, **fields)
        assert error_of(http().post(f"{tiny.url}{path}", json=body))["param"] == "stream_options"


@PATHS
def test_point_13_usage_so_far_is_on_each_chunk(tiny: ServerProcess, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = chunks(tiny, path, max_tokens=6, stream_options=options, temperature=0, ignore_eos=True)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == 6 and counts[-2] == 6
    usage = [event["usage"] for event in events]
    assert all(one["total_tokens"] == one["prompt_tokens"] + one["completion_tokens"] for one in usage)


def test_point_14_choices_interleave_and_the_prompt_counts_once(tiny: ServerProcess) -> None:
    asked: dict[str, Any] = {"n": 3, "max_tokens": 5, "ignore_eos": True, "seed": 1}
    events = chunks(tiny, COMPLETIONS, **asked, stream_options={"include_usage": True})
    alone = whole(tiny, COMPLETIONS, max_tokens=5, ignore_eos=True, seed=1)
    usage = events[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (alone["usage"]["prompt_tokens"], 15)
    assert {choice["index"] for event in events for choice in event["choices"]} == {0, 1, 2}
    assert text_of(events) == alone["choices"][0]["text"]


def test_point_15_an_empty_answer_has_a_role_and_an_end(scripted: Scripted) -> None:
    scripted.engine.answer = [EOS]
    assert [choice["delta"] for choice in of_choice(chunks(scripted, CHAT))] == [
        {"role": "assistant", "content": ""},
        {},
    ]
    (only,) = of_choice(chunks(scripted, COMPLETIONS))
    assert (only["text"], only["finish_reason"]) == ("", "stop")
    with client_of(scripted) as client:
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("", "stop")


@PATHS
@pytest.mark.parametrize("value", [True, False, None])
def test_point_16_obfuscation_may_be_asked_for(tiny: ServerProcess, path: str, value: bool | None) -> None:
    events = chunks(tiny, path, max_tokens=3, temperature=0, stream_options={"include_obfuscation": value})
    assert text_of(events) == text_of(chunks(tiny, path, max_tokens=3, temperature=0))


def test_the_sdk_reads_all_of_it(scripted: Scripted) -> None:
    """Its helpers add chunks up, and hold them to its types."""
    asked: Any = {"model": "tiny", "messages": MESSAGES, "n": 2}
    with client_of(scripted, _strict_response_validation=True) as client:
        with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
            kinds = {event.type for event in stream}
        final = stream.get_final_completion()
        answer = client.chat.completions.create(**asked)
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert [choice.message.content for choice in final.choices] == ["Hello, wörld!"] * 2
    assert [choice.message.content for choice in answer.choices] == ["Hello, wörld!"] * 2
    assert final.usage is not None and final.usage == answer.usage
