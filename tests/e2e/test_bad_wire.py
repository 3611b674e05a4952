"""Hostile HTTP and JSON over bare sockets: a 4xx in OpenAI's shape, or a hang-up where HTTP itself is broken."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from pathlib import Path

import pytest

from tests.e2e.process import ServerProcess, wait_until
from tests.e2e.wire import Answer, error_of, http_request, post, raw, read_answer

pytestmark = pytest.mark.usefixtures("unharmed")

GOOD = b'{"prompt": "a", "max_tokens": 1}'
URL = b"/v1/completions"


# ---- what can't be read as HTTP --------------------------------------------------------------------------

BROKEN = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n",
    "words": b"give me tokens please\r\n\r\n",
    "no version": b"GET /health\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "NUL in a header": b"GET /health HTTP/1.1\r\nhost: x\r\nx-a: a\x00b\r\n\r\n",
    "bare CR in a header": b"GET /health HTTP/1.1\r\nhost: x\r\nx-request-id: a\rx-evil: 1\r\n\r\n",
    "space in a header name": b"GET /health HTTP/1.1\r\nhost: x\r\nx a: b\r\n\r\n",
    "one header of 1 MB": b"GET /health HTTP/1.1\r\nhost: x\r\nx-a: " + b"a" * (1 << 20) + b"\r\n\r\n",
    "100,000 headers": b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 100_000 + b"\r\n",
    "a path of 1 MB": b"GET /" + b"a" * (1 << 20) + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    "endless chunk size": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    + b"f" * 99999,
    "negative length": http_request(b"", content_length="-1"),
    "length of words": http_request(GOOD, content_length="many"),
    "2^70 bytes announced": http_request(GOOD, content_length=str(1 << 70)),
    "two lengths": http_request(GOOD, content_length="32, 5"),
    "two encodings": http_request(GOOD, transfer_encoding="gzip, chunked"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_http_is_refused_and_the_connection_closed(tiny: ServerProcess, name: str) -> None:
    answer = raw(tiny.port, BROKEN[name])
    assert answer.closed
    if answer.status:
        answer.error()
        assert "x-evil" not in answer.headers
    else:
        assert len(BROKEN[name]) > 60_000  # it was cut off while it still sent


@pytest.mark.parametrize(
    ("name", "request_bytes", "status"),
    [
        ("unknown path", http_request(GOOD, "/v1/nothing"), 404),
        ("path up and away", http_request(GOOD, "/v1/../../../etc/passwd"), 404),
        ("encoded path", http_request(b"", "/v1/models/%2e%2e%2f%00%ff", "GET"), 404),
        ("wrong method", http_request(b"", method="GET"), 405),
        ("made-up method", http_request(b"", method="BREW"), 405),
        ("absolute URL", http_request(b"", "http://other.example/v1/nothing", "GET"), 404),
        ("HTTP/1.0", b"GET /v1/nothing HTTP/1.0\r\n\r\n", 404),
        ("form", http_request(b"prompt=a", content_type="application/x-www-form-urlencoded"), 415),
        ("plain text", http_request(GOOD, content_type="text/plain"), 415),
        ("nonsense type", http_request(GOOD, content_type=';;;="\xff'), 415),
        ("gzip", http_request(GOOD, content_encoding="gzip"), 415),
        ("1 GB announced", http_request(GOOD, content_length=str(1 << 30)), 413),
        ("2^63 bytes announced", http_request(GOOD, content_length=str(1 << 63)), 413),
        ("no body", http_request(b""), 400),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_requests_that_lead_nowhere(tiny: ServerProcess, name: str, request_bytes: bytes, status: int) -> None:
    answer = raw(tiny.port, request_bytes)
    assert answer.status == status, (name, answer)
    assert answer.error()["type"] == "invalid_request_error"


def test_a_body_without_an_end_in_sight_is_cut_off(tiny: ServerProcess) -> None:
    head = (
        b"POST " + URL + b" HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    answer = raw(tiny.port, head, *[chunk] * 40)  # more than twice what a body may have
    assert answer.closed and answer.status in (0, 413)
    if answer.status:
        assert answer.error()["code"] == "request_too_large"


def test_requests_that_never_end_time_out(tiny: ServerProcess) -> None:
    """Nothing sent, half a request line, half the headers, half a body."""
    starts = (b"", b"GET ", b"GET /health HTTP/1.1\r\nhost: x\r\nx-a: ", http_request(GOOD, content_length="4000"))
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(("127.0.0.1", tiny.port))) for _ in starts]
        for connection, start in zip(connections, starts, strict=True):
            connection.sendall(start)
        for connection in connections:
            answer = read_answer(connection)
            assert (answer.status, answer.closed) == (408, True)
            answer.error()


def test_a_client_that_hangs_up_in_the_middle(tiny: ServerProcess) -> None:
    whole = http_request(b'{"prompt": "a", "max_tokens": 300, "ignore_eos": true, "stream": true}')
    for size in (0, 1, 20, len(whole) - 30, len(whole) - 1, len(whole)):
        with socket.create_connection(("127.0.0.1", tiny.port)) as connection:
            connection.sendall(whole[:size])


def test_five_hundred_idle_connections(tiny: ServerProcess) -> None:
    def files() -> int:
        return len(list(Path(f"/proc/{tiny.pid}/fd").iterdir()))

    before = files()
    with contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection(("127.0.0.1", tiny.port), timeout=30)) for _ in range(500)
        ]
        assert raw(tiny.port, http_request(GOOD)).status == 200
        answers = [read_answer(connection, 30) for connection in connections]
        assert {answer.status for answer in answers} == {408} and all(answer.closed for answer in answers)
    wait_until(lambda: files() <= before + 5, "the files of the connections to be closed")


def test_one_connection_survives_its_refused_requests(tiny: ServerProcess) -> None:
    with socket.create_connection(("127.0.0.1", tiny.port), timeout=20) as connection:
        for body, status in ((b"{", 400), (b'{"prompt": ""}', 400), (GOOD, 200), (b"[]", 400), (GOOD, 200)):
            connection.sendall(http_request(body))
            answer = read_answer(connection)
            assert (answer.status, answer.closed) == (status, False)
        connection.sendall(http_request(GOOD) + http_request(b"{") + http_request(GOOD))  # without waiting between
        text = bytearray()
        while text.count(b"HTTP/1.1 ") < 3 or not text.endswith(b"}"):
            piece = connection.recv(1 << 16)
            assert piece, text
            text += piece
        assert re.findall(rb"HTTP/1\.1 (\d+)", text) == [b"200", b"400", b"200"]


@pytest.mark.parametrize("given", ["a\tb", "<script>", "é\xff", "a" * 5000, "%0d%0ax-evil: 1", "\nx-evil: 1", '"'])
def test_request_ids_carry_nothing_harmful(tiny: ServerProcess, given: str) -> None:
    answer = raw(tiny.port, http_request(GOOD, x_request_id=given))
    assert answer.status == 200 and "x-evil" not in answer.headers
    echoed = answer.headers["x-request-id"]
    assert 0 < len(echoed) <= 128 and echoed.isascii() and not set(echoed) & set("<>\"'\\ \t%")


# ---- JSON ------------------------------------------------------------------------------------------------

BAD_JSON = {
    "truncated": GOOD[:-1],
    "truncated in a string": b'{"prompt": "a',
    "two documents": GOOD + GOOD,
    "single quotes": b"{'prompt': 'a'}",
    "trailing comma": b'{"prompt": "a",}',
    "comment": b'{"prompt": "a"} // hi',
    "array": b"[1, 2]",
    "string": b'"prompt"',
    "null": b"null",
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "Infinity": b'{"prompt": "a", "temperature": Infinity}',
    "-Infinity": b'{"prompt": "a", "logit_bias": {"1": -Infinity}}',
    "1e999": b'{"prompt": "a", "temperature": 1e999}',
    "an integer of 5,000 digits": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    "a float of 5,000 digits": b'{"prompt": "a", "temperature": 0.' + b"9" * 5000 + b"e400}",
    "100,000 arrays deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "65 arrays deep in a field that nobody reads": b'{"prompt": "a", "user": ' + b"[" * 65 + b"]" * 65 + b"}",
    "100,000 objects deep": b'{"metadata":' * 100_000 + b"1" + b"}" * 100_000,
    "100,000 deep and open": b"[" * 100_000,
    "a million empty arrays": b'{"prompt": [' + b"[]," * 1_000_000 + b"[]]}",
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "lone low surrogate": b'{"prompt": "a\\udc00b"}',
    "raw surrogate": b'{"prompt": "\xed\xa0\x80"}',
    "latin-1": b'{"prompt": "\xe9"}',
    "UTF-16": GOOD.decode().encode("utf-16"),
    "raw NUL": b'{"prompt": "a\x00b"}',
    "raw line break": b'{"prompt": "a\nb"}',
    "bad escape": b'{"prompt": "\\x41"}',
    "spaces": b" " * 1000,
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json(tiny: ServerProcess, name: str) -> None:
    answer = raw(tiny.port, http_request(BAD_JSON[name]))
    assert answer.status == 400, (name, answer)
    assert len(answer.body) < 1000 and answer.error()["message"]


def test_text_that_is_odd_but_fine(tiny: ServerProcess) -> None:
    for prompt in ("a\x00b", "\ufffe\uffff", "\U0010ffff", "e\u0301" * 50, "\u202eabc", "\r\n\t\x1b[31m", "\x7f"):
        body = json.dumps({"prompt": prompt, "max_tokens": 1, "echo": True}).encode()
        answer = raw(tiny.port, http_request(body))
        assert answer.status == 200, (prompt, answer)
        assert json.loads(answer.body)["choices"][0]["text"].startswith(prompt)


def test_large_bodies(tiny: ServerProcess) -> None:
    fifteen = post(tiny.url, "/v1/completions", {"prompt": "a" * 15_000_000})
    assert error_of(fifteen)["code"] == "context_length_exceeded"
    hundred = raw(tiny.port, http_request(b'{"prompt": "' + b"a" * 100_000_000 + b'"}'))
    assert hundred.closed and hundred.status in (0, 413)
    chat = {"messages": [{"role": "user", "content": "a" * 15_000_000}]}
    assert error_of(post(tiny.url, "/v1/chat/completions", chat))["param"] == "messages"


def test_refusals_are_small_whatever_was_sent(tiny: ServerProcess) -> None:
    """Nothing echoes megabytes back, not one error per element either."""
    bodies: list[object] = [
        {"prompt": ["a", 1] * 100_000},
        {"prompt": "a", "model": "m" * 1_000_000},
        {"prompt": "a", "b" * 1_000_000: 1, "temperature": "hot" * 300_000},
        {"prompt": "a", "stop_token_ids": ["x"] * 100_000},
        {"messages": [{"role": "user"}] * 4000},
        {"messages": [{"role": "r" * 1_000_000, "content": "a"}]},
    ]
    for body in bodies:
        for path in ("/v1/completions", "/v1/chat/completions"):
            answer: Answer = raw(tiny.port, http_request(json.dumps(body).encode(), path))
            assert answer.error() and len(answer.body) < 1500
