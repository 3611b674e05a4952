"""Streams as they come over the wire, to the byte, and what the SDK makes of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from openai import OpenAI

from tests.e2e.process import ServerProcess
from tests.e2e.scripted import ScriptedServer
from tests.e2e.wire import Json, http

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES: Any = [{"role": "user", "content": "hi"}]
DONE = "data: [DONE]"


def client_of(server: ServerProcess | ScriptedServer, **options: Any) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="any", **{"max_retries": 0, "timeout": 60, **options})


def body_of(path: str, **fields: Any) -> Json:
    return {"messages": MESSAGES, **fields} if path == CHAT else {"prompt": "hi", **fields}


def wire_text(server: ServerProcess | ScriptedServer, path: str, **fields: Any) -> str:
    """The whole body of a stream."""
    response = http().post(f"{server.url}{path}", json=body_of(path, stream=True, **fields))
    assert response.status_code == 200, response.text
    return response.content.decode("utf-8")


def chunks(server: ServerProcess | ScriptedServer, path: str, **fields: Any) -> list[Json]:
    """The events of a stream, which ends with [DONE] and nothing behind it."""
    *events, last, rest = wire_text(server, path, **fields).split("\n\n")
    assert (last, rest) == (DONE, "")
    return [json.loads(event.removeprefix("data: ")) for event in events if not event.startswith(":")]


def whole(server: ServerProcess | ScriptedServer, path: str, **fields: Any) -> Json:
    response = http().post(f"{server.url}{path}", json=body_of(path, **fields))
    assert response.status_code == 200, response.text
    answer: Json = response.json()
    return answer


def of_choice(events: Sequence[Json], index: int = 0) -> list[Json]:
    return [choice for event in events for choice in event["choices"] if choice["index"] == index]


def text_of(events: Sequence[Json], index: int = 0) -> str:
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in of_choice(events, index))
