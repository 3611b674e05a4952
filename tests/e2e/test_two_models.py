"""An autoregressive and a diffusion model behind one port, each in an engine process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from engine.runtime.cores import threads_of, usable_cores
from tests.e2e.process import ServerProcess, children, wait_until
from tests.e2e.wire import Json, assert_idle, complete, error_of, get, http, post
from tests.tiny_diffusion import save_tiny_diffusion

WORDS, CANVAS = "words", "org/canvas"


@pytest.fixture(scope="module")
def server(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Nothing is said of threads and memory shares: both are divided."""
    folder = tmp_path_factory.mktemp("two")
    canvas = {"id": CANVAS, "path": str(save_tiny_diffusion("llada", folder / "llada"))}
    config: Json = {"models": [{"id": WORDS, "path": str(tiny_folder)}, canvas], "kv": {"memory": "8MiB"}}
    file = folder / "two.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    with ServerProcess("--config", str(file)) as server:
        yield server.wait_ready()
        server.send(signal.SIGTERM)
        assert server.wait() == 0, server.log[-3000:]
        server.assert_gone()


def streamed(url: str, model: str, prompt: str) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True, "stream": True}
    with http().stream("POST", f"{url}/v1/completions", json=body) as response:
        assert response.status_code == 200
        *events, done = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert done == "[DONE]" and {json.loads(event)["model"] for event in events} == {model}
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def test_each_model_answers_by_its_name_and_both_at_the_same_time(server: ServerProcess) -> None:
    asked = [(model, f"{n} of them") for n in range(3) for model in (WORDS, CANVAS)]
    alone = [complete(server.url, prompt, model=model, max_tokens=40, ignore_eos=True) for model, prompt in asked]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(lambda case: streamed(server.url, *case), asked)) == alone
    assert complete(server.url, "0 of them", max_tokens=40, ignore_eos=True) == alone[0], "the first is the default"
    assert_idle(server.url)


def test_both_are_listed_measured_and_told_apart(server: ServerProcess) -> None:
    cards = get(server.url, "/v1/models").json()["data"]
    assert [(card["id"], card["diffusion"] is None) for card in cards] == [(WORDS, True), (CANVAS, False)]
    assert get(server.url, f"/v1/models/{CANVAS}").json() == cards[1]
    missing = post(server.url, "/v1/completions", {"model": "third", "prompt": "a"})
    assert error_of(missing, low=404, high=404)["code"] == "model_not_found"
    page = get(server.url, "/metrics").text
    for name in (WORDS, CANVAS):
        assert f'slipstream:engine_healthy{{engine="0",model_name="{name}"}} 1.0' in page
        assert get(server.url, f"/health?model={name}").json() == {"status": "ok"}
        assert f"\n{name}: first token " in server.output
    first_of_canvas = server.output.index(f"{CANVAS}: ")
    assert server.output.index(f"{WORDS}: first token") < first_of_canvas, (
        "the second one starts when the first is done"
    )


def test_cores_and_memory_are_divided(server: ServerProcess) -> None:
    half = threads_of(usable_cores(), 0.5)
    assert re.findall(r": device .* threads: (\d+)", server.output) == [str(half)] * 2
    assert re.findall(r": KV pool .* blocks of 16 tokens, (\d+) MiB;", server.output) == ["4", "4"]


def test_one_that_dies_leaves_the_other_in_service(server: ServerProcess) -> None:
    """The last one: a server has no engine to put in the place of one that died."""
    before = complete(server.url, "as ever", model=CANVAS)
    words, _ = sorted(children(server.pid))  # started one after the other
    os.kill(words, signal.SIGKILL)
    wait_until(lambda: "degraded" in get(server.url, "/health").text, "/health to notice the death")
    for path, word in (("/health", "ok"), ("/ready", "ready")):
        told = get(server.url, path)
        assert told.status_code == 200 and told.json()["reason"].startswith(f"{WORDS}: ")
        assert get(server.url, f"{path}?model={WORDS}").status_code == 503
        assert get(server.url, f"{path}?model={CANVAS}").json() == {"status": word}
    refused = post(server.url, "/v1/completions", {"model": WORDS, "prompt": "a"})
    assert error_of(refused, low=503, high=503)["code"] == "engine_unavailable"
    assert streamed(server.url, CANVAS, "as ever").startswith(before[:4])
    assert complete(server.url, "as ever", model=CANVAS) == before
    page = get(server.url, "/metrics").text
    assert f'slipstream:engine_healthy{{engine="0",model_name="{WORDS}"}} 0.0' in page
    assert f'slipstream:engine_healthy{{engine="0",model_name="{CANVAS}"}} 1.0' in page
