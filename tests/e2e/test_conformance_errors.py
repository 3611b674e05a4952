"""Points 42 to 49 of the wire's conformance list: errors, over real sockets."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from engine.errors import Overloaded
from tests.e2e.process import ServerProcess
from tests.e2e.scripted import ScriptedServer
from tests.e2e.wire import check_error, error_of, get, http, post

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES: Any = [{"role": "user", "content": "hi"}]
WRONG = (  # method, path, body, status: one of every kind of refusal
    ("POST", CHAT, b'{"messages": [{"role": "user", "content": "x"}], "temperature": 9}', 400),
    ("POST", CHAT, b"{", 400),
    ("POST", CHAT, b'{"messages": [], "model": "other"}', 400),
    ("POST", COMPLETIONS, b'{"prompt": "x", "model": "other"}', 404),
    ("GET", "/v1/nothing", b"", 404),
    ("GET", "/nothing", b"", 404),
    ("GET", COMPLETIONS, b"", 405),
    ("DELETE", "/v1/models", b"", 405),
    ("POST", COMPLETIONS, b'{"prompt": "' + b"x" * (17 << 20) + b'"}', 413),
)


def client_of(server: ServerProcess | ScriptedServer, **options: Any) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="any", **{"max_retries": 0, "timeout": 30, **options})


@pytest.mark.parametrize("method, path, body, status", WRONG, ids=lambda value: str(value)[:24])
def test_point_42_one_shape_for_all_errors(
    tiny: ServerProcess, method: str, path: str, body: bytes, status: int
) -> None:
    headers = {"content-type": "application/json"}
    response = http().request(method, f"{tiny.url}{path}", content=body or None, headers=headers)
    assert response.status_code == status
    error_of(response)


def test_point_42_the_sdk_finds_the_parts_of_an_error(tiny: ServerProcess) -> None:
    with client_of(tiny) as client, pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=9)
    error = found.value
    assert (error.param, error.code, error.type) == ("temperature", "invalid_value", "invalid_request_error")


def test_point_43_codes_are_words(tiny: ServerProcess, keyed: ServerProcess) -> None:
    def code(response: httpx.Response) -> object:
        return error_of(response, high=599)["code"]

    assert code(post(keyed.url, CHAT, {"messages": MESSAGES})) == "invalid_api_key"
    assert code(post(tiny.url, CHAT, {"messages": MESSAGES, "model": "other"})) == "model_not_found"
    assert code(post(tiny.url, COMPLETIONS, {"prompt": "x" * 600})) == "context_length_exceeded"
    assert code(post(tiny.url, COMPLETIONS, {"prompt": "x", "n": 0})) == "invalid_value"
    assert code(post(tiny.url, COMPLETIONS, {"prompt": "x", "suffix": "y"})) == "unsupported_parameter"
    assert code(post(tiny.url, COMPLETIONS, {"prompt": "x", "stop": list("abcde")})) == "array_above_max_length"


def test_point_44_context_overflow_says_so_in_the_known_words(tiny: ServerProcess) -> None:
    for path, body, param in (
        (CHAT, {"messages": [{"role": "user", "content": "word " * 200}], "max_tokens": 7}, "messages"),
        (COMPLETIONS, {"prompt": "word " * 200, "max_tokens": 7}, "prompt"),
    ):
        error = error_of(post(tiny.url, path, body))
        assert (error["code"], error["param"], error["type"]) == (
            "context_length_exceeded",
            param,
            "invalid_request_error",
        )
        assert error["message"].startswith("This model's maximum context length is 512 tokens. However, you requested ")
        assert f"in the {param}, 7 in the completion). Please reduce the length" in error["message"]


def test_point_45_wrong_types_are_400_with_the_path_and_small(tiny: ServerProcess) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "user", "content": 7}]
    error = error_of(post(tiny.url, CHAT, {"messages": messages}))
    assert error["param"] == "messages[1].content"
    error = error_of(post(tiny.url, CHAT, {}))
    assert (error["param"], error["code"]) == ("messages", "missing_required_parameter")
    bad = post(tiny.url, CHAT, {"messages": [{"role": 5, "content": {"a": "b" * 5000}}] * 1000})
    assert bad.status_code == 400 and len(bad.content) < 1000


def test_point_46_statuses_and_their_headers(
    tiny: ServerProcess, keyed: ServerProcess, scripted: ScriptedServer
) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic c2s="}):
        refused = http().post(f"{keyed.url}{CHAT}", json={"messages": MESSAGES}, headers=headers)
        assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Bearer")
    assert http().get(f"{tiny.url}{CHAT}").headers["allow"] == "POST"
    plain = http().post(f"{tiny.url}{CHAT}", content=b"{}", headers={"content-type": "text/plain"})
    assert plain.status_code == 415
    scripted.engine.refusal = Overloaded("the queue is full", "max_num_queued_reqs", retry_after=3)
    full = post(scripted.url, CHAT, {"messages": MESSAGES})
    assert full.status_code == 503 and full.headers["retry-after"] == "3"
    assert check_error(full.json())["type"] == "server_error"


def test_point_47_what_fails_for_good_is_tried_once(tiny: ServerProcess, scripted: ScriptedServer) -> None:
    seen: list[int] = []

    def note(response: httpx.Response) -> None:
        seen.append(response.status_code)

    def watched() -> Any:
        return openai.DefaultHttpxClient(event_hooks={"response": [note]}, trust_env=False)

    with client_of(tiny, max_retries=2, http_client=watched()) as client, pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="x", n=0)
    assert seen == [400]
    seen.clear()
    scripted.engine.refusal = Overloaded("the queue is full", "max_num_queued_reqs", retry_after=0)
    with client_of(scripted, max_retries=1, http_client=watched()) as client, pytest.raises(openai.InternalServerError):
        client.completions.create(model="tiny", prompt="x")
    assert seen == [503, 503]  # worth a second try, after the second that Retry-After says


def test_point_48_request_ids_come_back(tiny: ServerProcess) -> None:
    with client_of(tiny) as client:
        answer = client.completions.create(
            model="tiny", prompt="x", max_tokens=1, extra_headers={"X-Request-Id": "mine-1"}
        )
    assert answer._request_id == "mine-1"
    ids = {get(tiny.url, "/v1/models").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3 and all(ids)


def test_point_49_failures_say_nothing_of_the_inside(scripted: ScriptedServer) -> None:
    scripted.engine.refusal = RuntimeError("boom at /secret/path.py 0x7f00")
    response = post(scripted.url, CHAT, {"messages": MESSAGES})
    assert response.status_code == 500 and response.headers["x-should-retry"] == "false"
    assert b"secret" not in response.content and b"boom" not in response.content
    check_error(response.json())
