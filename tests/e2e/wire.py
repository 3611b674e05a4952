"""What the tests read from a running server over plain HTTP and bare sockets."""

from __future__ import annotations

import functools
import json
import socket
import time
from dataclasses import dataclass
from typing import Any

import httpx

from tests.e2e.process import wait_until

Json = dict[str, Any]
IDLE = {"vllm:num_requests_running": 0.0, "vllm:num_requests_waiting": 0.0, "vllm:kv_cache_usage_perc": 0.0}


@functools.cache
def http() -> httpx.Client:
    """One client for all: making one costs more than most requests here. Each request has a connection of its own."""
    return httpx.Client(verify=False, trust_env=False, timeout=60, limits=httpx.Limits(max_keepalive_connections=0))


def get(url: str, path: str) -> httpx.Response:
    return http().get(f"{url}{path}")


def post(url: str, path: str, body: object) -> httpx.Response:
    return http().post(f"{url}{path}", json=body)


def complete(url: str, prompt: str | list[int], **fields: Any) -> str:
    """The greedy continuation of a text or of token ids."""
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, **fields}
    response = post(url, "/v1/completions", body)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def error_of(response: httpx.Response, *, low: int = 400, high: int = 499) -> Json:
    """The error object of a refusal. Checks the shape that every error has, and that nothing inside leaks out."""
    assert low <= response.status_code <= high, (response.status_code, response.text[:500])
    assert response.headers["content-type"] == "application/json"
    assert len(response.content) < 2000, len(response.content)
    assert response.headers["x-request-id"]
    return check_error(response.json())


def check_error(body: Json) -> Json:
    assert set(body) == {"error"}, body
    error: Json = body["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert isinstance(error["message"], str) and error["message"]
    assert all(error[name] is None or isinstance(error[name], str) for name in ("param", "code"))
    for leak in ("Traceback", "/server/", "/engine/", ".py", "0x7"):
        assert leak not in error["message"], error
    return error


def metrics(url: str) -> dict[str, float]:
    """The metrics page, every family summed over its series."""
    sums: dict[str, float] = {}
    for line in get(url, "/metrics").text.splitlines():
        if not line.startswith("#"):
            series, _, value = line.rpartition(" ")
            name = series.partition("{")[0]
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def assert_idle(url: str) -> None:
    """Nothing runs or waits, and no live request holds a block; waits for what is on its way out."""
    wait_until(lambda: {name: metrics(url)[name] for name in IDLE} == IDLE, f"these metrics: {IDLE}")


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back on a bare socket: `status` 0 when the server hung up without a word."""

    status: int
    headers: dict[str, str]
    body: bytes
    closed: bool

    def error(self) -> Json:
        assert 400 <= self.status <= 499, self
        assert self.headers["content-type"] == "application/json"
        return check_error(json.loads(self.body))


def raw(port: int, *pieces: bytes, seconds: float = 20.0) -> Answer:
    """Send bytes as they are and read until one response is whole or the server hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has heard enough; its answer may still be there
        return read_answer(connection, seconds)


def read_answer(connection: socket.socket, seconds: float = 20.0) -> Answer:
    data, closed, deadline = bytearray(), False, time.monotonic() + seconds
    while not closed and not _whole(data):
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            piece = connection.recv(1 << 16)
        except ConnectionResetError:
            piece = b""
        data += piece
        closed = not piece
    if not data:
        return Answer(0, {}, b"", closed)
    head, _, body = bytes(data).partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Answer(int(status.split()[1]), headers, body, closed or headers.get("connection") == "close")


def _whole(data: bytearray) -> bool:
    head, end, body = bytes(data).partition(b"\r\n\r\n")
    if not end:
        return False
    length = next(
        (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), None
    )
    return length is not None and len(body) >= length


def http_request(body: bytes, path: str = "/v1/completions", method: str = "POST", **headers: str) -> bytes:
    """The bytes of a request; header names are written with underscores."""
    given = {"host": "x", "content_type": "application/json", "content_length": str(len(body)), **headers}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in given.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body
