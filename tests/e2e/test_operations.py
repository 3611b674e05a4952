"""What operators do to the real command: cancel, forget, record, trace, watch; and where it may listen."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import TINY_SETTINGS, setting_arguments
from tests.e2e.process import COMMAND, ROOT, START_SECONDS, ServerProcess, run_command, wait_until
from tests.e2e.wire import assert_idle
from tests.server.test_network import make_pair, trusting
from tests.server.test_tracing import Collector

ADMIN = {"authorization": "Bearer root"}
TEAM = {"authorization": "Bearer team-key"}
USER = {"authorization": "Bearer user-key"}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def operated(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> Iterator[tuple[ServerProcess, Path]]:
    folder = tmp_path_factory.mktemp("operated")
    limits = {"keys": {"team": {"api_key": "team-key", "concurrent_requests": 2}}}
    settings = setting_arguments(
        *TINY_SETTINGS,
        "server.admin_key=root",
        "server.api_key=user-key",
        f"server.limits={json.dumps(limits)}",
        f"server.profile_dir={folder / 'profiles'}",
    )
    with ServerProcess(str(tiny_folder), *settings, "--otlp-endpoint", collector.url) as server:
        yield server.wait_ready(), folder
        server.assert_clean_end()


def ask(client: httpx.Client, prompt: str, **fields: Any) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}
    return client.post("/v1/completions", json=body, headers=fields.pop("headers", USER))


def admin(client: httpx.Client, name: str, **body: Any) -> dict[str, Any]:
    response = client.post(f"/admin/{name}", json=body, headers=ADMIN)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def test_a_forgotten_prefix_is_computed_again(operated: tuple[ServerProcess, Path]) -> None:
    with httpx.Client(base_url=operated[0].url, timeout=60) as client:
        prompt = "remember this prompt, it is long enough for some blocks. " * 3

        def cached() -> int:
            return int(ask(client, prompt).json()["usage"]["prompt_tokens_details"]["cached_tokens"])

        cached()
        assert cached() >= 128
        assert admin(client, "reset_prefix_cache")["blocks"].popitem()[1] >= 8
        assert cached() == 0 and cached() >= 128


def test_an_abort_reaches_streams_and_leaves_nothing(operated: tuple[ServerProcess, Path]) -> None:
    server, _ = operated
    with httpx.Client(base_url=server.url, timeout=60) as client:
        body = {"prompt": "go on", "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 3}
        headers = {**TEAM, "x-request-id": "long-one"}
        with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            lines = response.iter_lines()
            next(line for line in lines if line.startswith("data: "))
            (row,) = client.get("/admin/requests", headers=ADMIN).json()["requests"]
            assert (row["request_id"], row["key"], len(row["ids"])) == ("long-one", "team", 3)
            assert client.get("/load").json()["server_load"] == 1
            assert admin(client, "abort", request_id="long-one") == {"aborted": 3}
            assert [line for line in lines if line][-1] == "data: [DONE]"
    wait_until(lambda: httpx.get(f"{server.url}/load").json()["server_load"] == 0, "an end of the exchange")
    assert_idle(server.url)


def test_places_are_counted_and_given_back(operated: tuple[ServerProcess, Path]) -> None:
    server, _ = operated
    with httpx.Client(base_url=server.url, timeout=60) as client:
        body = {"prompt": "go on", "max_tokens": 400, "ignore_eos": True, "stream": True}
        for _ in range(3):  # clients that leave in the middle
            with (
                client.stream("POST", "/v1/completions", json=body, headers=TEAM) as one,
                client.stream("POST", "/v1/completions", json=body, headers=TEAM) as two,
            ):
                assert (one.status_code, two.status_code) == (200, 200)
                refused = client.post("/v1/completions", json=body, headers=TEAM)
                assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"
                assert refused.headers["retry-after"] == "1"
            wait_until(lambda: client.get("/load").json()["server_load"] == 0, "both places to be free")
        page = client.get("/metrics").text
        assert 'slipstream:rate_limited_requests_total{key="team",limit="concurrency"} 3.0' in page
        assert 'slipstream:key_requests_running{key="team"} 0.0' in page and "team-key" not in page
    assert_idle(server.url)


def test_steps_are_recorded(operated: tuple[ServerProcess, Path]) -> None:
    server, folder = operated
    with httpx.Client(base_url=server.url, timeout=60) as client:
        told = admin(client, "profile", action="start", seconds=60)
        assert Path(told["folder"]).parent == folder / "profiles"
        again = client.post("/admin/profile", json={"action": "start"}, headers=ADMIN)
        assert again.status_code == 409 and "under way already" in again.text
        ask(client, "some steps, please")
        assert admin(client, "profile", action="stop")["steps"] >= 8
        steps = [json.loads(line) for line in Path(told["folder"], "steps.jsonl").read_text().splitlines()]
        assert len(steps) >= 8 and all(step["seconds"] > 0 for step in steps)
        trace = json.loads(Path(told["folder"], "trace.json").read_text())
        assert any(str(event.get("name", "")).startswith("aten::") for event in trace["traceEvents"])
        assert ask(client, "and on").status_code == 200


def test_a_drained_server_is_taken_back(operated: tuple[ServerProcess, Path]) -> None:
    with httpx.Client(base_url=operated[0].url, timeout=60) as client:
        assert admin(client, "drain")["draining"] is True
        assert client.get("/ready").status_code == 503 and ask(client, "x").status_code == 503
        assert admin(client, "undrain")["draining"] is False
        assert client.get("/ready").status_code == 200 and ask(client, "x").status_code == 200


def test_traces_arrive(operated: tuple[ServerProcess, Path], collector: Collector) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with httpx.Client(base_url=operated[0].url, timeout=60, headers={"traceparent": parent}) as client:
        answer = ask(client, "trace me").json()

    def spans() -> dict[str, Any]:
        found = [
            span
            for _, request in collector.got
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        return {span.name: span for span in found if span.trace_id.hex() == parent[3:35]}

    wait_until(lambda: len(spans()) == 4, "the spans of one request", 30)  # the exporter sends every five seconds
    root = next(span for name, span in spans().items() if name.startswith("text_completion "))
    told = {item.key: item.value for item in root.attributes}
    assert told["gen_ai.response.id"].string_value == answer["id"]
    assert told["gen_ai.usage.output_tokens"].int_value == 8
    queue, prefill, decode = (spans()[name] for name in ("queue", "prefill", "decode"))
    assert {span.parent_span_id for span in (queue, prefill, decode)} == {root.span_id}
    assert queue.start_time_unix_nano <= prefill.start_time_unix_nano < decode.start_time_unix_nano
    assert decode.end_time_unix_nano <= root.end_time_unix_nano + 1_000_000


def test_top_shows_the_real_server(operated: tuple[ServerProcess, Path]) -> None:
    shown = run_command("top", "--once", "--interval", "0.2", "--url", operated[0].url)
    assert shown.returncode == 0 and " ok  running 0  waiting 0  KV " in shown.stdout, shown.stderr


@contextmanager
def started(log: Path, *arguments: str) -> Iterator[str]:
    """The command with these arguments; gives where it says that it is. It must end well when asked to."""
    with log.open("wb") as out:
        command = [*COMMAND, "serve", *arguments, *setting_arguments(*TINY_SETTINGS)]
        server = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    try:

        def told() -> re.Match[str] | None:
            assert server.poll() is None, log.read_text()
            return re.search(r" at (\S+) \(Ctrl-C[^\0]*\ncurl ", log.read_text())

        wait_until(lambda: told() is not None, "the end of the start-up table", START_SECONDS)
        found = told()
        assert found is not None
        yield found[1]
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0, log.read_text()
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


def test_a_unix_socket(tiny_folder: Path, tmp_path: Path) -> None:
    path, log = tmp_path / "s.sock", tmp_path / "log"
    with started(log, str(tiny_folder), "--uds", str(path), "--set", 'server.uds_mode="600"') as where:
        assert where == f"unix:{path}" and path.stat().st_mode & 0o777 == 0o600
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://localhost", timeout=60) as client:
            assert ask(client, "through a file").json()["usage"]["completion_tokens"] == 8
        shown = run_command("complete", "--url", where, "--max-tokens", "4", "hello")
        assert shown.returncode == 0 and shown.stdout.strip(), shown.stderr
        line = next(line for line in log.read_text().splitlines() if line.startswith("curl "))
        assert shlex.split(line)[1:4] == ["--unix-socket", str(path), "http://localhost/v1/chat/completions"]
        taken = run_command("serve", str(tiny_folder), "--uds", str(path))
        assert taken.returncode == 1 and "Address already in use" in taken.stderr
    assert not path.exists()


def test_https(tiny_folder: Path, tmp_path: Path) -> None:
    cert, key = make_pair(tmp_path, "operator")
    tls = ["--tls-cert", str(cert), "--tls-key", str(key)]
    with started(tmp_path / "log", str(tiny_folder), "--port", "0", *tls) as where:
        assert where.startswith("https://127.0.0.1:")
        with httpx.Client(base_url=where.removesuffix("/v1"), verify=trusting(cert), timeout=60) as client:
            assert ask(client, "over TLS").json()["usage"]["completion_tokens"] == 8
            with client.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as response:
                assert [line for line in response.iter_lines() if line][-1] == "data: [DONE]"


def test_wrong_settings_are_told(tiny_folder: Path, tmp_path: Path) -> None:
    cert, key = make_pair(tmp_path, "operator")
    for arguments, message in (
        (["--tls-cert", str(key), "--tls-key", str(cert), "--port", "0"], "server.tls_cert, server.tls_key: "),
        (["--uds", "x", "--port", "1"], "--uds takes the place of --host and --port"),
    ):
        ended = run_command("serve", str(tiny_folder), *arguments)
        assert ended.returncode == 2 and message in ended.stderr and "Traceback" not in ended.stderr, ended.stderr
