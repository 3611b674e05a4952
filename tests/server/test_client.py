"""`slipstream chat` and `complete` against a small HTTP server that sends what an OpenAI-compatible one sends."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from server.cli import main

DONE = "data: [DONE]\n\n"


def event(text: str, kind: str = "delta") -> str:
    choice = {"index": 0, "delta": {"content": text}} if kind == "delta" else {"index": 0, "text": text}
    return f"data: {json.dumps({'id': 'x', 'choices': [choice]})}\n\n"


class Upstream(ThreadingHTTPServer):
    """Answers POSTs with `replies` in turn, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.models: object = {"object": "list", "data": [{"id": "first"}, {"id": "second"}]}
        self.replies: list[tuple[int, str]] = []
        self.asked: list[tuple[str, dict[str, object], str | None]] = []


class _Handler(BaseHTTPRequestHandler):
    server: Upstream

    def do_GET(self) -> None:
        self._send(200 if self.path == "/v1/models" else 404, json.dumps(self.server.models))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.path, body, self.headers["authorization"]))
        self._send(*self.server.replies.pop(0))

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *arguments: object) -> None: ...


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[Upstream]:
    monkeypatch.delenv("SLIPSTREAM_API_KEY", raising=False)
    with Upstream() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets what the user types."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_complete_prints_the_stream(upstream: Upstream, capsys: pytest.CaptureFixture[str]) -> None:
    upstream.replies = [
        (200, ": comment\n\n" + event(" a", "text") + event("", "text") + event(" bé\n", "text") + DONE)
    ]
    flags = ["--max-tokens", "5", "--temperature", "0", "--seed", "7", "--api-key", "sk-1"]
    assert main(["complete", "Once", "--url", upstream.url, *flags]) == 0
    assert capsys.readouterr().out == " a bé\n\n"
    body = {"model": "first", "stream": True, "max_tokens": 5, "temperature": 0.0, "seed": 7, "prompt": "Once"}
    assert upstream.asked == [("/v1/completions", body, "Bearer sk-1")]


def test_complete_reads_standard_input(upstream: Upstream, typed: Callable[[str], None]) -> None:
    upstream.replies = [(200, DONE)]
    typed("two\nlines")
    assert main(["complete", "-", "--url", f"{upstream.url}/v1/", "--model", "second"]) == 0
    assert upstream.asked == [
        ("/v1/completions", {"model": "second", "stream": True, "prompt": "two\nlines"}, None),
    ]


def test_the_key_of_the_environment_is_used(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_API_KEY", "sk-2")
    upstream.replies = [(200, DONE)]
    assert main(["complete", "x", "--url", upstream.url]) == 0
    assert upstream.asked[0][2] == "Bearer sk-2"


def test_passes_are_shown_where_they_are_asked_for(upstream: Upstream, capsys: pytest.CaptureFixture[str]) -> None:
    told = {"rule": "frechet", "knobs": {"delta": 0.25}, "cache": "dual", "block_length": 32, "canvas": 64}
    told |= {"forwards": 9, "draft_forwards": 0, "verifies": 0, "remasked": 0, "tokens_per_forward": 4.25, "more": 1}
    drafted = {**told, "knobs": {}, "draft_forwards": 12, "verifies": 3, "remasked": 2}
    for diffusion in (told, drafted, None):
        last = f"data: {json.dumps({'choices': [], 'diffusion': diffusion})}\n\n"
        upstream.replies.append((200, event(" a", "text") + last + DONE))
        assert main(["complete", "x", "--url", upstream.url, "--show-passes"]) == 0
        assert upstream.asked[-1][1]["diffusion"] == {"report": True}
    how = "cache dual; blocks of 32; canvas 64: 9 forward passes"
    assert capsys.readouterr().out.splitlines() == [
        *(" a", f"[rule frechet, delta 0.25; {how}, 4.25 tokens each]"),
        *(" a", f"[rule frechet; {how} and 12 of its drafter, 4.25 tokens each; 3 verified, and took back 2 tokens]"),
        *(" a", "[this server does not tell how it denoises]"),
    ]


def test_chat_keeps_the_conversation(
    upstream: Upstream, typed: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    upstream.replies = [
        (200, event("Hel") + event("lo") + DONE),
        (200, event("fine") + DONE),
        (200, event("new") + DONE),
    ]
    typed("hi\n\n/what\nhow?\n/clear\nagain\n/exit\nnever sent\n")
    assert main(["chat", "--url", upstream.url, "--system", "Be brief."]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if not line.startswith("/")] == [
        "Hello",
        "fine",
        "new",
    ]
    system = {"role": "system", "content": "Be brief."}
    first = [system, {"role": "user", "content": "hi"}]
    second = [*first, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "how?"}]
    third = [system, {"role": "user", "content": "again"}]
    assert [body["messages"] for _, body, _ in upstream.asked] == [first, second, third]


def test_chat_goes_on_after_an_error(
    upstream: Upstream, typed: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    refused = json.dumps(
        {"error": {"message": "too long", "type": "invalid_request_error", "param": None, "code": None}}
    )
    upstream.replies = [(400, refused), (200, event("ok") + DONE)]
    typed("much too long\nshort\n")
    assert main(["chat", "--url", upstream.url]) == 0
    captured = capsys.readouterr()
    assert captured.err == "slipstream: too long\n" and "ok\n" in captured.out
    assert upstream.asked[1][1]["messages"] == [{"role": "user", "content": "short"}]


@pytest.mark.parametrize(
    ("status", "reply", "message"),
    [
        (401, '{"error": {"message": "Incorrect API key provided."}}', "Incorrect API key provided."),
        (502, "<html>Bad Gateway</html>", "HTTP 502 Bad Gateway"),
        (200, event("half") + 'data: {"error": {"message": "the engine died", "code": 503}}\n\n', "the engine died"),
        (200, event("half"), "the answer ended before it was complete"),
        (200, "data: <html>\n\n", "answers, but not like an OpenAI API"),
    ],
)
def test_what_goes_wrong_is_one_line_and_exit_code_1(
    upstream: Upstream, capsys: pytest.CaptureFixture[str], status: int, reply: str, message: str
) -> None:
    upstream.replies = [(status, reply)]
    assert main(["complete", "x", "--url", upstream.url]) == 1
    error = capsys.readouterr().err
    assert error.startswith("slipstream: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("models", [{"data": []}, {"detail": "Not Found"}, [1]])
def test_a_server_without_models(upstream: Upstream, capsys: pytest.CaptureFixture[str], models: object) -> None:
    upstream.models = models
    assert main(["complete", "x", "--url", upstream.url]) == 1
    assert capsys.readouterr().err.startswith("slipstream: ")


def test_no_server_there(capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_address[1]
    assert main(["chat", "--url", f"127.0.0.1:{port}"]) == 1
    assert f"no server answers at http://127.0.0.1:{port}/v1/; start one with" in capsys.readouterr().err
    assert main(["chat", "--url", "http://[broken"]) == 1
    assert main(["chat", "--url", "ftp://127.0.0.1"]) == 1


def test_ctrl_c_ends_the_answer_and_not_the_conversation(
    upstream: Upstream, typed: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def print_until_two(*values: object, **_: object) -> None:
        if values == ("two",):
            raise KeyboardInterrupt

    upstream.replies = [(200, event("one") + event("two") + event("three") + DONE), (200, event("x") + DONE)]
    monkeypatch.setattr("builtins.print", print_until_two)
    typed("a\nb\n")
    assert main(["chat", "--url", upstream.url]) == 0
    assert upstream.asked[1][1]["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "onetwo"},
        {"role": "user", "content": "b"},
    ]
