"""From start to end: drain, Ctrl-C, processes that are killed or hang. Every test has a server of its own."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.e2e.conftest import setting_arguments
from tests.e2e.process import ServerProcess, alive, free_port, run_command, wait_until
from tests.e2e.wire import Json, check_error, complete, error_of, get, post

LONG: Json = {"prompt": "a long story", "max_tokens": 400, "ignore_eos": True, "n": 16, "seed": 1, "stream": True}


class OpenStream:
    """A stream whose first event has been read."""

    def __init__(self, response: httpx.Response) -> None:
        assert response.status_code == 200
        self._lines = response.iter_lines()
        self.first = next(self._lines)

    def rest(self) -> list[str]:
        """All further data lines; returns when the server ends the stream."""
        return [line.removeprefix("data: ") for line in self._lines if line.startswith("data: ")]


@contextmanager
def open_stream(url: str, body: Json = LONG) -> Iterator[OpenStream]:
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        yield OpenStream(response)


def health(url: str) -> int:
    return get(url, "/health").status_code


def test_start_and_a_drain_that_lets_streams_finish(tiny_folder: Path) -> None:
    port = free_port()
    with ServerProcess(str(tiny_folder), port=port) as server:
        wait_until(lambda: _listens(server.url), "the port to answer while the model loads")
        early = post(server.url, "/v1/completions", {"prompt": "a"})
        error = error_of(early, low=503, high=503)
        assert error["code"] == "starting" and int(early.headers["retry-after"]) > 0
        assert get(server.url, "/ready").status_code == 503 == health(server.url)
        server.wait_ready()
        assert health(server.url) == 200
        alone = complete(server.url, "a", max_tokens=5)
        with open_stream(server.url) as stream:
            server.send(signal.SIGTERM)
            wait_until(lambda: get(server.url, "/ready").status_code == 503, "draining to show in /ready")
            refused = post(server.url, "/v1/completions", {"prompt": "a"})
            assert error_of(refused, low=503, high=503)["code"] == "draining"
            assert int(refused.headers["retry-after"]) > 0
            assert health(server.url) == 200
            *events, done = stream.rest()
        assert done == "[DONE]"
        choices = [json.loads(event)["choices"][0] for event in events]
        assert sorted(c["index"] for c in choices if c["finish_reason"] == "length") == list(range(16))
        assert alone and server.wait() == 0
        server.assert_gone()
        assert "Traceback" not in server.log and " ERROR " not in server.log


def _listens(url: str) -> bool:
    try:
        return get(url, "/version").status_code == 200
    except httpx.ConnectError:
        return False


def test_a_second_signal_does_not_wait(tiny_folder: Path) -> None:
    with ServerProcess(str(tiny_folder)) as server, open_stream(server.wait_ready().url) as stream:
        engine = server.engine_pid
        os.kill(engine, signal.SIGSTOP)  # so that the stream can't end by itself
        server.send(signal.SIGTERM)
        wait_until(lambda: get(server.url, "/ready").status_code == 503, "draining to show in /ready")
        server.send(signal.SIGTERM)
        *_, error, done = stream.rest()
        assert check_error(json.loads(error))["type"] == "server_error" and done == "[DONE]"
        assert server.wait() == 0
        server.assert_gone()


def test_ctrl_c_while_the_model_loads(tiny_folder: Path) -> None:
    with ServerProcess(str(tiny_folder)) as server:
        wait_until(lambda: "\ncheckpoint " in server.output, "the first phase")
        server.assert_clean_end(signal.SIGINT, group=True)
        assert "curl" not in server.output


def test_an_engine_that_hangs_and_one_that_dies(tiny_folder: Path) -> None:
    with ServerProcess(str(tiny_folder), *setting_arguments("scheduler.stall_seconds=1.0")) as server:
        engine = server.wait_ready().engine_pid
        before = complete(server.url, "the same")
        with open_stream(server.url) as stream:
            os.kill(engine, signal.SIGSTOP)
            wait_until(lambda: health(server.url) == 503, "/health to notice the hang")
            assert "no progress" in get(server.url, "/health").json()["reason"]
            os.kill(engine, signal.SIGCONT)
            assert stream.rest()[-1] == "[DONE]"
        assert health(server.url) == 200 and complete(server.url, "the same") == before
        with open_stream(server.url) as stream, open_stream(server.url, {**LONG, "n": 1}) as other:
            os.kill(engine, signal.SIGKILL)
            for broken in (stream, other):
                *_, error, done = broken.rest()
                assert check_error(json.loads(error))["code"] == "engine_unavailable" and done == "[DONE]"
        wait_until(lambda: health(server.url) == 503, "/health to notice the death")
        assert "SIGKILL" in get(server.url, "/health").json()["reason"]
        refused = post(server.url, "/v1/completions", {"prompt": "a"})
        assert error_of(refused, low=503, high=503)["code"] == "engine_unavailable"
        assert get(server.url, "/metrics").status_code == 200
        server.send(signal.SIGTERM)
        assert server.wait() == 0
        server.assert_gone()


def test_a_front_that_is_killed_takes_its_engine_along(tiny_folder: Path) -> None:
    with ServerProcess(str(tiny_folder)) as server, open_stream(server.wait_ready().url):
        engine = server.engine_pid
        server.send(signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        wait_until(lambda: not alive(engine), "the end of the engine process")
        server.assert_gone()


def test_output_that_nobody_reads_and_a_long_path_for_temporary_files(tiny_folder: Path) -> None:
    """As in `slipstream serve | head -1`."""
    with ServerProcess(str(tiny_folder), port=free_port(), temporary="t" * 150, unread=True) as server:
        assert complete(server.wait_ready().url, "a")
        server.assert_clean_end()


# ---- what can go wrong at the start ----------------------------------------------------------------------


def test_a_busy_port_and_a_wrong_model_are_one_line(tiny: ServerProcess, tmp_path: Path) -> None:
    busy = run_command("serve", "demo", "--port", str(tiny.port))
    assert (busy.returncode, busy.stdout) == (1, "") and busy.stderr.count("\n") == 1, busy.stderr
    assert f"cannot listen on 127.0.0.1 port {tiny.port}: Address already in use" in busy.stderr
    (tmp_path / "config.json").write_text("{}")
    for model, said in (("no/such/model/here", "neither"), (str(tmp_path), "model.safetensors")):
        wrong = run_command("serve", model, "--port", "0")
        lines = wrong.stderr.splitlines()
        assert wrong.returncode == 1 and wrong.stdout == "", wrong
        assert len(lines) == 1 and lines[0].startswith("slipstream: ") and said in lines[0], wrong.stderr
        assert "Traceback" not in wrong.stderr
