"""Points 64 to 69 of the wire's conformance list: paths, probes, connections, over real sockets."""

from __future__ import annotations

import gzip
import json
from http.client import HTTPConnection

import pytest
from openai import OpenAI

from tests.e2e.scripted import ScriptedServer
from tests.e2e.wire import error_of, get, http, post
from tests.server.fake_engine import FakeEngine

BODY = {"messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"


def test_point_64_model_ids_may_hold_slashes() -> None:
    with ScriptedServer(FakeEngine("org/team/model")) as server:
        with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            assert client.models.retrieve("org/team/model").id == "org/team/model"
        assert get(server.url, "/v1/models/org/team/model").json()["id"] == "org/team/model"
        assert error_of(get(server.url, "/v1/models/org/team"))["code"] == "model_not_found"


def test_point_65_head_and_preflight_pass_without_a_key() -> None:
    with ScriptedServer(api_key="sk-right", cors_origins=("https://page.example",)) as server:
        assert http().head(f"{server.url}/").status_code == 200
        asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
        preflight = http().options(
            f"{server.url}{CHAT}", headers={**asked, "access-control-request-headers": "authorization"}
        )
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://page.example"
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        assert post(server.url, CHAT, BODY).status_code == 401


def test_point_66_harmless_fields_are_taken_and_ignored(scripted: ScriptedServer) -> None:
    plain = post(scripted.url, CHAT, BODY).json()
    harmless = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "prediction": {"type": "content", "content": "x"},
        "modalities": ["text"],
        "verbosity": "low",
    }
    for name, value in harmless.items():
        answer = post(scripted.url, CHAT, {**BODY, name: value})
        assert answer.status_code == 200, (name, answer.text)
        assert answer.json()["choices"] == plain["choices"]


def test_point_67_a_prefix_that_a_proxy_adds(scripted: ScriptedServer) -> None:
    with ScriptedServer(root_path="/llm") as server:
        for prefix in ("", "/llm"):
            assert post(server.url, f"{prefix}{CHAT}", BODY).status_code == 200
            assert get(server.url, f"{prefix}/health").status_code == 200
            assert get(server.url, f"{prefix}/v1/models").json()["data"][0]["id"] == "tiny"
    for path in ("/v1/models/", "/health/"):
        assert get(scripted.url, path).status_code == 200, path
    assert post(scripted.url, f"{CHAT}/", BODY).status_code == 200


@pytest.mark.parametrize("encodings", ["gzip, deflate, br, zstd", "identity", "*;q=0"])
def test_point_68_compression_breaks_no_stream(scripted: ScriptedServer, encodings: str) -> None:
    with http().stream(
        "POST", f"{scripted.url}{CHAT}", json={**BODY, "stream": True}, headers={"accept-encoding": encodings}
    ) as response:
        assert response.headers.get("content-encoding", "identity") == "identity"
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)


def test_point_68_compressed_requests_are_refused_by_name(scripted: ScriptedServer) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    response = http().post(f"{scripted.url}{CHAT}", content=gzip.compress(json.dumps(BODY).encode()), headers=headers)
    assert response.status_code == 415
    error_of(response)


def test_point_69_one_connection_survives_its_refused_requests(scripted: ScriptedServer) -> None:
    connection = HTTPConnection("127.0.0.1", scripted.port, timeout=20)
    connection.connect()
    socket = connection.sock
    wrong = (b"{", b"{}", json.dumps({**BODY, "temperature": 9}).encode(), json.dumps({**BODY, "n": -1}).encode())
    for body in (*wrong, json.dumps(BODY).encode()) * 3:
        connection.request("POST", CHAT, body, {"content-type": "application/json"})
        response = connection.getresponse()
        response.read()
        assert connection.sock is socket, "the connection was closed"
        assert response.status == (200 if body not in wrong else 400)
    connection.close()
